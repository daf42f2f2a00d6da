"""Squared norms of sums of outer products, from Gram matrices."""

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.numerics import BLOCK


class Squares(NamedTuple):
    """What a kernel that finds norms without stacking gradients returns: four times `(B,)`.

    A gradient is a sum over positions of terms, each the product of a row of the input and one of the gradient at the
    output. How large those are tells how far rounding may have gone.
    """

    norms: Tensor
    """Squared norms of the gradients; rounding can leave one of zero slightly negative."""
    terms: Tensor
    """Sums of the squared norms of the terms."""
    inputs: Tensor
    """Sums of the squared norms of the input's rows."""
    outputs: Tensor
    """Sums of the squared norms of the rows of the gradient at the output."""

    def over_groups(self, groups: int) -> "Squares":
        """Add up the groups of channels that each example has: `(B * groups,)` to `(B,)`."""
        return Squares(*(part.reshape(-1, groups).sum(1) for part in self))


def few_at_a_time(
    norms: Callable[[Tensor, Tensor], Squares], x: Tensor, g: Tensor, numbers: int, several: int = 1
) -> Squares:
    """Find norms for as many examples at a time as fit into `BLOCK`, or for one at the least.

    Args:
        norms: `(x, g) -> Squares` for any B.
        x: `(B * several, ...)`.
        g: `(B * several, ...)`.
        numbers: how many numbers `norms` holds for one example.
        several: rows of `x` and `g` that are of one example.
    """
    step = max(1, BLOCK // numbers) * several
    if step >= x.shape[0]:
        return norms(x, g)
    parts = [norms(*part) for part in zip(x.split(step), g.split(step), strict=True)]
    return Squares(*map(torch.cat, zip(*parts, strict=True)))


Gram = Callable[[Tensor, int, int], Tensor]
"""`(rows (B, T, p), start, stop) -> block (B, T - start, stop - start)` of the rows' Gram matrix, only to be read."""


def gram(rows: Tensor, start: int, stop: int) -> Tensor:
    """Make the columns from `start` to `stop` of a Gram matrix, from the diagonal's first row down: see `Gram`."""
    # The wider operand first: the other way round, a product of this shape takes half as long again.
    return torch.bmm(rows[:, start:] if start else rows, rows[:, start:stop].mT)


class SharedGram:
    """The Gram matrix of a gradient that two weights met, made for the one that asks first: see `Gram`.

    It is kept until the other has asked, and only if it is no larger than `BLOCK`. Whoever asks with another tensor,
    or with the same one after a change in place, has a new one made.
    """

    def __init__(self) -> None:
        self._rows: weakref.ref[Tensor] | None = None
        self._version = 0
        self._blocks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Take a block that is kept, or make it and keep it."""
        if self._rows is None or self._rows() is not rows or self._version != rows._version:
            self._rows, self._version = weakref.ref(rows), rows._version
            self._blocks.clear()
        found = self._blocks.pop((start, stop), None)
        if found is None:
            found = gram(rows, start, stop)
            if rows.shape[0] * rows.shape[1] ** 2 <= BLOCK:
                self._blocks[start, stop] = found
        return found


def gram_norm(x: Tensor, g: Tensor, block: int = BLOCK, gram_of_g: Gram = gram) -> Squares:
    """Squared norm of `g[b]ᵀ x[b]` for each b, as `sum over t, t' of (g_t · g_t') (x_t · x_t')`.

    Args:
        x: `(B, T, D)`.
        g: `(B, T, p)`.
        block: numbers that one block of a Gram matrix may hold; the matrices are made in blocks of columns, and of a
            block only what lies on or below the diagonal, since both are symmetric.
        gram_of_g: makes the blocks of `g`'s Gram matrix.

    Returns:
        The squared norms; what else there is to tell is on the matrices' diagonals.

    Source: Goodfellow 2015 for T = 1; Li et al. 2022, "ghost clipping"; Bu, Mao & Xu 2022.
    """
    batch, positions = x.shape[:2]
    if positions == 1:
        inputs, outputs = (torch.linalg.vecdot(t, t).squeeze(1) for t in (x, g))
        return Squares(inputs * outputs, inputs * outputs, inputs, outputs)
    columns = max(1, min(_columns_by_symmetry(positions), block // (batch * positions)))
    lone = columns > 1 and positions % columns == 1  # a class token: products like one row too many less than one apart
    norms, diagonals = x.new_zeros(batch), []
    for start, stop in pairwise([0, *range(1 if lone else columns, positions, columns), positions]):
        products, weights = gram(x, start, stop), gram_of_g(g, start, stop)
        diagonals.append(diagonals_of(products, weights))
        by_row = products.mul_(weights).sum(2)
        norms += by_row[:, : stop - start].sum(1)
        if stop < positions:  # what lies below the square on the diagonal stands for what lies right of it too
            norms.add_(by_row[:, stop - start :].sum(1), alpha=2)
    return squares(norms, diagonals)


def diagonals_of(products: Tensor, weights: Tensor, offset: int = 0) -> Tensor:
    """Copy the diagonals of the blocks of two Gram matrices, which start `offset` off them: `(2, B, positions)`."""
    return torch.stack([block.diagonal(offset, dim1=1, dim2=2) for block in (products, weights)])


def squares(norms: Tensor, diagonals: Sequence[Tensor]) -> Squares:
    """Tell what there is to tell from the squared norms, and from the diagonals of the input's and the output's matrix.

    Args:
        norms: `(B,)`.
        diagonals: `(2, B, ·)`, a block of positions each.
    """
    lengths = diagonals[0] if len(diagonals) == 1 else torch.cat(list(diagonals), 2)
    return Squares(norms, lengths.prod(0).sum(1), *lengths.sum(2).unbind())


def _columns_by_symmetry(positions: int) -> int:
    """Columns of a block: few enough that leaving out a triangle saves; a multiple of 16, which products like."""
    blocks = -(-positions // 48)
    return positions if blocks == 1 else 16 * round(positions / blocks / 16)
