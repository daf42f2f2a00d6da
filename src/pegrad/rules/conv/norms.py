"""Squared norms of a convolution's per-example weight gradients, without the gradients.

Both kernels take `x` `(B * N, C, *size)` and `g` `(B * N, D, *output)`, N images an example, and return `Squares`. With
`u[t]` a row of the unfolded input,

    norm² = sum over positions t, t' of  (g[t] · g[t']) * (u[t] · u[t'])

for each group of channels, the positions being those of all images of the example: images interfere. They take a few
examples at a time, or one example in blocks of rows of the two Gram matrices, so that memory is bounded whatever the
number of positions.
"""

from collections.abc import Iterator
from functools import partial
from math import prod

from torch import Tensor

from pegrad.numerics import BLOCK
from pegrad.rules.conv.geometry import Geometry, pad
from pegrad.rules.conv.kernels import by_channel, windows
from pegrad.rules.gram import Squares, diagonals_of, few_at_a_time, gram_norm, squares


def gram_unfolded(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Squares:
    """Gram matrices of the im2col rows: about `T² (D + p)` multiply-adds.

    Source: Bu, Mao & Xu 2022, "ghost norm" for convolutions.
    """
    positions, channels, offsets = images * prod(g.shape[2:]), x.shape[1], prod(geometry.kernel)
    numbers = positions * (channels * offsets + geometry.groups * positions)
    return few_at_a_time(partial(_gram_unfolded, geometry=geometry, images=images), x, g, numbers, images)


def _gram_unfolded(x: Tensor, g: Tensor, geometry: Geometry, images: int) -> Squares:
    nd, groups = geometry.ndim, geometry.groups
    lines = by_channel(g, images).reshape(x.shape[0] // images * groups, g.shape[1] // groups, -1).mT
    columns = windows(x, geometry).unflatten(1, (groups, -1)).unflatten(0, (-1, images))
    positions_first = (0, 2, 1, *range(4, 4 + nd), 3, *range(4 + nd, 4 + 2 * nd))
    return gram_norm(columns.permute(positions_first).reshape(*lines.shape[:2], -1), lines).over_groups(groups)


def gram_box(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Squares:
    """Gram matrix of the raw padded input, box-filtered over the kernel offsets: no im2col.

    The product of two unfolded rows is a sum over kernel offsets of products of input positions, all of which are in
    the Gram matrix of the input itself; the sum separates by axis. About `T² (C + p + sum of kernel sizes)` at
    stride 1. Of two images only one order is looked at.
    """
    pixels = prod(n + 2 * p for n, p in zip(x.shape[2:], geometry.padding, strict=True))
    numbers = geometry.groups * images * pixels**2
    return few_at_a_time(partial(_gram_box, geometry=geometry, images=images), x, g, numbers, images)


def _gram_box(x: Tensor, g: Tensor, geometry: Geometry, images: int) -> Squares:
    groups, nd = geometry.groups, geometry.ndim
    padded = pad(x, [width for p in reversed(geometry.padding) for width in (p, p)])
    size, output = padded.shape[2:], g.shape[2:]
    # (B * groups, channels / groups, N, *size)
    pixels, lines = (by_channel(t, images).unflatten(1, (groups, -1)).flatten(0, 1) for t in (padded, g))
    norms, diagonals = x.new_zeros(pixels.shape[0]), []
    for image in range(images):
        later_pixels, later_lines = pixels[:, :, image:].flatten(2), lines[:, :, image:].flatten(2)
        for block in _row_blocks(geometry, pixels.shape[0] * (images - image), size, output):
            top = block.start * geometry.stride[0]
            bottom = (block.stop - 1) * geometry.stride[0] + geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
            products = pixels[:, :, image, top:bottom].flatten(2).mT @ later_pixels
            products = products.reshape(-1, bottom - top, *size[1:], images - image, *size)
            for axis in range(nd):
                products = _filter(products, axis + 1, axis + 2 + nd, geometry, axis)
            weights = lines[:, :, image, block].flatten(2).mT @ later_lines
            products = products.reshape(weights.shape)
            diagonals.append(diagonals_of(products, weights, block.start * prod(output[1:])))
            weights[:, :, prod(output) :] *= 2
            norms += products.mul_(weights).flatten(1).sum(1)
    return squares(norms, diagonals).over_groups(groups)


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
