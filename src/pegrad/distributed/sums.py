"""A clipped sum over many ranks' examples: in floating point, or in fixed point, where its bits are always the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.accumulation import Added, Sums, nothing
from pegrad.errors import ArgumentError
from pegrad.numerics import accumulator
from pegrad.per_example import ClippedGrad
from pegrad.ranks import ClippedSum
from pegrad.trees import PyTree

Send = Callable[[int, Tensor], Tensor]
"""`(leaf, this rank's sum) -> the sum over all ranks`, whole or this rank's part of it; the argument may be changed."""

Summation = Callable[[ClippedGrad, int, Send], ClippedSum]
"""`(clipped, rows, send)`: how a clipped sum over `rows` rows of all ranks, padding counted, is added up."""


@dataclass(frozen=True)
class _Summed:
    """A clipped gradient whose sum is taken over all ranks."""

    clipped: ClippedGrad
    rows: int
    send: Send

    @property
    def sensitivity(self) -> float:
        """See `ClippedGrad.sensitivity`."""
        return self.clipped.sensitivity

    @property
    def normalize_by(self) -> float:
        """See `ClippedGrad.normalize_by`."""
        return self.clipped.normalize_by


@dataclass(frozen=True)
class FastSum(_Summed):
    """Add up the ranks' sums in their own floating-point dtype.

    Bits depend on how rows are cut and on the ranks; the sum is that of one process up to rounding, whose bound is in
    `docs/rounding.md`. Every rank gets the same bits.
    """

    def init(self, params: PyTree) -> Sums:
        """See `ClippedGrad.init`."""
        return self.clipped.init(params)

    def add(self, sums: Sums, params: PyTree, batch: PyTree, mask: Tensor | None) -> Added:
        """See `ClippedGrad.add`."""
        return self.clipped.add(sums, params, batch, mask)

    def finish(self, sums: Sums) -> PyTree:
        """Return the sum over all ranks, in the dtype of a sum of so many rows."""
        leaves, spec = trees.flatten(sums.grads)
        dtypes = [accumulator(dtype, self.rows) for dtype in sums.dtypes]
        own = (leaf.to(dtype, copy=True).contiguous() for leaf, dtype in zip(leaves, dtypes, strict=True))
        return trees.unflatten(spec, [self.send(index, leaf) for index, leaf in enumerate(own)])


class Fixed(NamedTuple):
    """A sum in fixed point on its way."""

    grads: PyTree
    """Like the parameters, int64: multiples of the quantum."""


@dataclass(frozen=True)
class ExactSum(_Summed):
    """Add up micro-batches in fixed point: the same bits whatever the ranks are, and in whatever order they are added.

    Each micro-batch's sum is rounded to multiples of a quantum, 2^-40 of the sensitivity or a little more, which is a
    public constant, as int64; integers add up without rounding. It sends 8 bytes a parameter, in float32 twice as many
    as `FastSum`. The bits of a micro-batch's own sum are those of one kind of machine with one number of threads.

    Why it is a matter of privacy. Noise is a function of the key and the step. A step that is taken again, after a
    failure say, adds the same noise: to the same sum it gives the same answer, and nothing more is told. To a sum that
    differs, if only in rounding because there are fewer ranks now, it gives an answer whose difference to the first is
    that of the sums, without noise.

    Guarantee: the sum is a function of the micro-batches alone, bit for bit, and its sensitivity is that of `clipped`
    up to rounding: for micro-batches whose composition changes, by at most half a quantum in every number of each.
    Bound to `test_the_exact_sum_has_the_same_bits_on_any_number_of_ranks`.
    """

    def __post_init__(self) -> None:
        if self.rows > MOST_ROWS:
            raise ArgumentError(f"Expected at most {MOST_ROWS} rows in an exact sum, padding counted, got {self.rows}")

    @property
    def quantum(self) -> float:
        """What one unit is worth: a power of two, so that only rounding to it rounds."""
        return math.ldexp(1.0, math.frexp(self.sensitivity)[1] - _BITS)

    def init(self, params: PyTree) -> Fixed:
        """See `ClippedGrad.init`."""
        return Fixed(trees.map(lambda leaf: leaf.new_zeros(leaf.shape, dtype=torch.int64), nothing(params).grads))

    def add(self, sums: Fixed, params: PyTree, batch: PyTree, mask: Tensor | None) -> Added:
        """Round a micro-batch's sum to multiples of the quantum, and add them."""
        added = self.clipped.add(self.clipped.init(params), params, batch, mask)
        whole = trees.map(self._rounded, added.sums.grads)
        return added._replace(sums=Fixed(trees.map(torch.add, sums.grads, whole)))  # type: ignore[arg-type]

    def finish(self, sums: Fixed) -> PyTree:
        """Return the sum over all ranks, in float64."""
        leaves, spec = trees.flatten(sums.grads)
        whole = [self.send(index, leaf.clone()) for index, leaf in enumerate(leaves)]
        return trees.unflatten(spec, [leaf.double().mul_(self.quantum) for leaf in whole])

    def _rounded(self, leaf: Tensor) -> Tensor:
        return leaf.double().div_(self.quantum).round_().clamp_(-_FARTHEST, _FARTHEST).to(torch.int64)


_BITS = 40
MOST_ROWS = 1 << 22
"""Of an exact sum: so many of them, each of the sensitivity, fill 62 bits."""
_FARTHEST = 2.0**62  # no clipped sum reaches it
