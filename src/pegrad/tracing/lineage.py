"""Which parameter leaves a tensor was made of, and whether its norm tells theirs: read from autograd's graph."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from pegrad.torch_internals import backward_node

# What these do to a gradient on its way back leaves its norm alone: each has one input, of which it permutes, reshapes
# or casts every number, or picks some, each at most once. Whole names: a user's own `autograd.Function` called
# `Transpose` is the node `TransposeBackward`, and a name that PyTorch adds one day must be read before it is believed.
_ISOMETRIC = frozenset({
    "TBackward0", "TransposeBackward0", "TransposeBackward1", "PermuteBackward0", "ViewBackward0",
    "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "ToCopyBackward0", "CloneBackward0", "AliasBackward0", "SelectBackward0", "SliceBackward0",
    "SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0",
})  # fmt: skip

_FUNCTIONS: set[type] = set()  # nodes of our own functions that do the same


def isometry(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Decorate a function of one tensor whose way back is linear and leaves the norm of a gradient as it is."""
    _FUNCTIONS.add(backward_node(function))
    return function


_LEAF = "torch::autograd::AccumulateGrad"


class Lineage(NamedTuple):
    """Where a tensor comes from."""

    leaves: frozenset[int]
    """Indices of the parameter leaves that it depends on."""
    isometric: bool
    """Whether the norm of a gradient at the tensor is that of the gradient that it makes at its one leaf."""
    linear: bool = True
    """Whether the gradients at the leaves are known to be linear in the one at the tensor. A user's own
    `autograd.Function` may do anything."""
    cast: bool = False
    """Whether there is a cast on the way, which a gradient goes through as well."""


def lineage(tensor: Tensor, leaves: Mapping[int, int]) -> Lineage:
    """Find the leaves that a tensor was made of.

    Args:
        tensor: the result of differentiable operations, or a leaf of the graph.
        leaves: for each parameter leaf its index, by `id`.
    """
    if tensor.grad_fn is None:
        alone = id(tensor) in leaves
        return Lineage(frozenset({leaves[id(tensor)]} if alone else ()), alone)
    found: set[int] = set()
    isometric = linear = True
    cast = False
    seen: set[Any] = set()
    stack = [tensor.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == _LEAF:  # not by its attributes: a user's node may have any
            if id(node.variable) in leaves:
                found.add(leaves[id(node.variable)])
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        known = type(node) in _FUNCTIONS
        isometric &= (known or node.name() in _ISOMETRIC) and len(parents) == 1
        linear &= known or not isinstance(node, BackwardCFunction)
        cast |= node.name().startswith("ToCopyBackward")
        stack += parents
    return Lineage(frozenset(found), isometric and len(found) == 1, linear, cast)


def reaches(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Tell whether a value's graph leads to any of some tensors, leaves of it or not."""
    leaves = {id(tensor) for tensor in tensors if tensor.grad_fn is None}
    nodes = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    if value.grad_fn is None:
        return value.requires_grad and id(value) in leaves
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in nodes or (node.name() == _LEAF and id(node.variable) in leaves):
            return True
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
    return False
