"""Sums of clipped gradients that grow micro-batch by micro-batch, at the memory of one."""

from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.errors import LeafError
from pegrad.numerics import FLOAT32_ROWS, accumulator
from pegrad.problem import Leaves
from pegrad.trees import PyTree

FEW = 8
"""So many sums one after another, and each addition rounds in float64."""


class Sums(NamedTuple):
    """A sum of clipped gradients on its way: what `ClippedGrad.init` begins and `ClippedGrad.add` adds to.

    It is a value: nothing that holds one sees it change. It has no noise, so it is as private as the examples.
    """

    grads: PyTree
    """Like the parameters: the sum so far, in float32 or float64."""
    dtypes: tuple[torch.dtype, ...]
    """Of the parameters, leaf by leaf."""
    rows: int
    """Rows added so far, padding counted: a sum over many is a float64."""
    parts: int
    """Sums added so far."""


class Added(NamedTuple):
    """What `ClippedGrad.add` returns: the sums with one micro-batch more, and what its forward pass gave.

    Only the sums are bounded by the sensitivity; the other fields tell of single examples, without any protection.
    """

    sums: Sums
    losses: Tensor
    """`(B,)` of the micro-batch; 0 for padding."""
    norms: Tensor
    """`(B,)`, before clipping, or `(G, B)` where clipping is by groups; 0 for padding."""
    aux: PyTree
    """What the loss returned beside the scalar, each leaf with a leading axis `B`; None if it returned nothing."""
    non_finite: Tensor
    """Examples that contributed zero because their gradient was not finite, int64 scalar."""


torch.serialization.add_safe_globals([Sums, Added])  # for torch.load's default, weights_only=True


def nothing(params: PyTree) -> Sums:
    """Return the sum over no example: zeros that take no memory.

    Raises:
        LeafError: a leaf of `params` is no floating-point tensor.
    """
    leaves, spec = trees.flatten_params(params)
    kinds = [(leaf.device, accumulator(leaf.dtype)) for leaf in leaves]
    zeros = {kind: torch.zeros((), device=kind[0], dtype=kind[1]) for kind in dict.fromkeys(kinds)}
    empty = [zeros[kind].expand(leaf.shape) for kind, leaf in zip(kinds, leaves, strict=True)]
    return Sums(trees.unflatten(spec, empty), tuple(leaf.dtype for leaf in leaves), 0, 0)


def extended(sums: Sums, params: Leaves, leaves: Leaves, rows: int) -> Sums:
    """Add the sum over some rows at these parameters, and change nothing.

    The first sum is taken as it is. Where rows or sums are many, additions are in float64: see `FLOAT32_ROWS`.

    Raises:
        LeafError: the sums are of other parameters.
    """
    before, spec = trees.flatten(sums.grads)
    if [leaf.shape for leaf in before] != [leaf.shape for leaf in params]:
        raise LeafError(
            "sums are of other parameters: expected what init(params) or add(...) returned for these params"
        )
    rows += sums.rows
    if sums.parts:
        exact = rows > FLOAT32_ROWS or sums.parts + 1 >= FEW
        leaves = [torch.add(a.double() if exact else a, b) for a, b in zip(before, leaves, strict=True)]
    return Sums(trees.unflatten(spec, leaves), sums.dtypes, rows, sums.parts + 1)


def total(sums: Sums) -> PyTree:
    """Return the whole sum, in the dtype of a sum of so many rows: however they were cut, the same one."""
    leaves, spec = trees.flatten(sums.grads)
    dtypes = [accumulator(dtype, sums.rows) for dtype in sums.dtypes]
    whole = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return trees.unflatten(spec, whole if sums.parts else [leaf.contiguous() for leaf in whole])
