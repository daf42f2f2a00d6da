"""Squared norms of a convolution's per-example weight gradients, without the gradients.

Both kernels take `x` `(B, C, *size)` and `g` `(B, D, *output)` and return `Squares`. With `u[t]` a row of the unfolded
input,

    norm² = sum over positions t, t' of  (g[t] · g[t']) * (u[t] · u[t'])

for each group of channels. They take a few examples at a time, or one example in blocks of rows of the two Gram
matrices, so that memory is bounded whatever the number of positions.
"""

from collections.abc import Iterator
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor

from pegrad.numerics import BLOCK
from pegrad.rules.conv.geometry import Geometry
from pegrad.rules.conv.kernels import windows
from pegrad.rules.gram import Squares, few_at_a_time, gram_norm, note_diagonals


def gram_unfolded(x: Tensor, g: Tensor, geometry: Geometry) -> Squares:
    """Gram matrices of the im2col rows: about `T² (D + p)` multiply-adds.

    Source: Bu, Mao & Xu 2022, "ghost norm" for convolutions.
    """
    positions, channels, offsets = prod(g.shape[2:]), x.shape[1], prod(geometry.kernel)
    numbers = positions * (channels * offsets + geometry.groups * positions)
    return few_at_a_time(partial(_gram_unfolded, geometry=geometry), x, g, numbers)


def _gram_unfolded(x: Tensor, g: Tensor, geometry: Geometry) -> Squares:
    batch, nd, groups = x.shape[0], geometry.ndim, geometry.groups
    positions = prod(g.shape[2:])
    columns = windows(x.unflatten(1, (groups, -1)).flatten(0, 1), geometry)  # (B * groups, C / groups, *out, *kernel)
    rows = columns.permute(0, *range(2, 2 + nd), 1, *range(2 + nd, 2 + 2 * nd)).reshape(batch * groups, positions, -1)
    lines = g.reshape(batch * groups, -1, positions).mT
    return gram_norm(rows, lines).over_groups(groups)


def gram_box(x: Tensor, g: Tensor, geometry: Geometry) -> Squares:
    """Gram matrix of the raw padded input, box-filtered over the kernel offsets: no im2col.

    The product of two unfolded rows is a sum over kernel offsets of products of input positions, all of which are in
    the Gram matrix of the input itself; the sum separates by axis. About `T² (C + p + sum of kernel sizes)` at
    stride 1.
    """
    pixels = prod(n + 2 * p for n, p in zip(x.shape[2:], geometry.padding, strict=True))
    return few_at_a_time(partial(_gram_box, geometry=geometry), x, g, geometry.groups * pixels**2)


def _gram_box(x: Tensor, g: Tensor, geometry: Geometry) -> Squares:
    batch, groups, nd = x.shape[0], geometry.groups, geometry.ndim
    padded = F.pad(x, [width for p in reversed(geometry.padding) for width in (p, p)])
    size, output = padded.shape[2:], g.shape[2:]
    pixels = padded.reshape(batch * groups, -1, prod(size))
    lines = g.reshape(batch * groups, -1, *output)
    found = Squares(*x.new_zeros(4, batch * groups))
    for block in _row_blocks(geometry, batch * groups, size, output):
        top = block.start * geometry.stride[0]
        bottom = (block.stop - 1) * geometry.stride[0] + geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
        part = padded[:, :, top:bottom].reshape(batch * groups, pixels.shape[1], -1)
        products = (part.mT @ pixels).reshape(-1, bottom - top, *size[1:], *size)
        for axis in range(nd):
            products = _filter(products, axis + 1, axis + 1 + nd, geometry, axis)
        weights = lines[:, :, block].flatten(2).mT @ lines.flatten(2)
        products = products.reshape(weights.shape)
        note_diagonals(found, products, weights, block.start * prod(output[1:]))
        found.norms.add_(products.mul_(weights).flatten(1).sum(1))
    return found.over_groups(groups)


def _filter(products: Tensor, row: int, column: int, geometry: Geometry, axis: int) -> Tensor:
    """Sum the diagonals that one axis of the kernel reaches: positions turn from inputs to outputs on that axis."""
    k, s, d = geometry.kernel[axis], geometry.stride[axis], geometry.dilation[axis]
    rows, columns = ((products.shape[a] - d * (k - 1) - 1) // s + 1 for a in (row, column))

    def diagonal(i: int) -> Tensor:
        part = products.narrow(row, d * i, s * (rows - 1) + 1).narrow(column, d * i, s * (columns - 1) + 1)
        return part if s == 1 else _every(_every(part, row, s), column, s)

    total = diagonal(0) + diagonal(1) if k > 1 else diagonal(0)
    for i in range(2, k):
        total += diagonal(i)
    return total


def _every(t: Tensor, axis: int, step: int) -> Tensor:
    return t[(slice(None),) * axis + (slice(None, None, step),)]


def _row_blocks(geometry: Geometry, batch: int, size: tuple[int, ...], output: tuple[int, ...]) -> Iterator[slice]:
    """Cut the first output axis so that a block's products stay within `BLOCK` numbers, or one row at the least."""
    one_row = batch * prod(size) * prod(size[1:]) * geometry.stride[0]
    rows = max(1, min(output[0], BLOCK // one_row - geometry.dilation[0] * (geometry.kernel[0] - 1)))
    for start in range(0, output[0], rows):
        yield slice(start, min(start + rows, output[0]))
