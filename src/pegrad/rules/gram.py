"""Squared norms of sums of outer products, from Gram matrices."""

from collections.abc import Callable

import torch
from torch import Tensor

from pegrad.numerics import BLOCK

Squares = tuple[Tensor, Tensor]
"""Squared norms and squared terms, `(B,)` each: see `Site.norming`."""


def few_at_a_time(norms: Callable[[Tensor, Tensor], Squares], x: Tensor, g: Tensor, numbers: int) -> Squares:
    """Find norms for as many examples at a time as fit into `BLOCK`, or for one at the least.

    Args:
        norms: `(x, g) -> Squares` for any B.
        x: `(B, ...)`.
        g: `(B, ...)`.
        numbers: how many numbers `norms` holds for one example.
    """
    step = max(1, BLOCK // numbers)
    if step >= x.shape[0]:
        return norms(x, g)
    parts = [norms(*part) for part in zip(x.split(step), g.split(step), strict=True)]
    squares, terms = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(terms)


def gram_norm(x: Tensor, g: Tensor, block: int = BLOCK) -> Squares:
    """Squared norm of `g[b]ᵀ x[b]` for each b, as `sum over t, t' of (g_t · g_t') (x_t · x_t')`.

    Args:
        x: `(B, T, D)`.
        g: `(B, T, p)`.
        block: numbers that one block of a Gram matrix may hold; the matrices are made in blocks of rows, and of a
            block only what lies on or right of the diagonal, since both are symmetric.

    Returns:
        The squared norms, of which rounding can leave one of zero slightly negative; and the sum over t of the squared
        norms of the terms `g_t x_tᵀ`, from the matrices' diagonals.

    Source: Goodfellow 2015 for T = 1; Li et al. 2022, "ghost clipping"; Bu, Mao & Xu 2022.
    """
    batch, positions = x.shape[:2]
    if positions == 1:
        squares = torch.linalg.vecdot(x, x).mul_(torch.linalg.vecdot(g, g)).squeeze(1)
        return squares, squares
    rows = max(1, min(_rows_by_symmetry(positions), block // (batch * positions)))
    total, terms = x.new_zeros(batch), x.new_zeros(batch)
    for start in range(0, positions, rows):
        stop = min(start + rows, positions)
        products = x[:, start:stop] @ x[:, start:].mT
        weights = g[:, start:stop] @ g[:, start:].mT
        diagonal = stop - start
        if stop < positions:
            weights[:, :, diagonal:] *= 2
        products.mul_(weights)
        terms += products.diagonal(dim1=1, dim2=2).sum(1)
        total += products.flatten(1).sum(1)
    return total, terms


def _rows_by_symmetry(positions: int) -> int:
    """Rows of a block: few enough that leaving out the lower triangle saves, enough for the matrix product."""
    blocks = 1 if positions < 48 else 2 if positions < 160 else 4
    return -(-positions // blocks)
