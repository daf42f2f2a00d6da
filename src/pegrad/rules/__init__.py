"""What each kind of operation contributes to a per-example gradient: one family a file or folder."""

from collections.abc import Callable

from pegrad.rules import conv, decompositions, embedding, linear, native, normalisation, products, recurrent
from pegrad.rules.site import Rule

RULES: dict[Callable, Rule] = {
    **conv.RULES, **linear.RULES, **products.RULES, **embedding.RULES, **normalisation.RULES, **recurrent.RULES,
    **decompositions.RULES, **native.RULES,
}  # fmt: skip
"""For each function of PyTorch's that has one, its rule."""
