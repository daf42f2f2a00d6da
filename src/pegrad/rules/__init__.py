"""What each kind of operation contributes to a per-example gradient: one family a file or folder."""

from collections.abc import Callable

from pegrad.rules import conv, embedding, linear, native, normalisation, recurrent
from pegrad.rules.site import Rule

RULES: dict[Callable, Rule] = (
    conv.RULES | linear.RULES | embedding.RULES | normalisation.RULES | recurrent.RULES | native.RULES
)
"""For each function of PyTorch's that has one, its rule."""
