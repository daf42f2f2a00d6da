"""Which parameter leaves a tensor was made of, and whether its norm tells theirs: read from autograd's graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What these do to a gradient on its way back leaves its norm alone: they permute, reshape, cast, or add zeros.
_ISOMETRIC = (
    "TBackward", "TransposeBackward", "PermuteBackward", "MovedimBackward", "ViewBackward", "UnsafeViewBackward",
    "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward", "ToCopyBackward", "CloneBackward", "AliasBackward",
    "SelectBackward", "SliceBackward", "SplitBackward", "SplitWithSizesBackward", "UnbindBackward",
)  # fmt: skip


@dataclass(frozen=True)
class Lineage:
    """Where a tensor comes from."""

    leaves: frozenset[int]
    """Indices of the parameter leaves that it depends on."""
    isometric: bool
    """Whether the norm of a gradient at the tensor is that of the gradient that it makes at its one leaf."""
    cast: bool = False
    """Whether there is a cast on the way, which a gradient goes through as well."""


def lineage(tensor: Tensor, leaves: Mapping[int, int]) -> Lineage:
    """Find the leaves that a tensor was made of.

    Args:
        tensor: a leaf, or the result of differentiable operations.
        leaves: for each parameter leaf its index, by `id`.
    """
    if tensor.grad_fn is None:
        return Lineage(frozenset({leaves[id(tensor)]}), True)
    found: set[int] = set()
    isometric, cast = True, False
    seen: set[Any] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            if id(node.variable) in leaves:
                found.add(leaves[id(node.variable)])
            continue
        isometric &= node.name().startswith(_ISOMETRIC)
        cast |= node.name().startswith("ToCopyBackward")
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    return Lineage(frozenset(found), isometric and len(found) == 1, cast)
