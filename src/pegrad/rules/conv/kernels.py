"""Per-example weight gradients of a convolution: five ways to compute one thing.

Every kernel takes the input `x` `(B * N, C, *size)` and the output gradient `g` `(B * N, D, *output)` of `B` examples
of `N` images each, and returns the `B` weight gradients, stacked, `(B, D, C/groups, *kernel)`:

    grad[b, d, c, k] = sum over images n and output positions t of
        g[b, n, d, t] * xpad[b, n, c, stride * t + dilation * k]

for the channels c of d's group. They differ only in speed; `choose` in `cost.py` picks one.
"""

from collections.abc import Callable
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.errors import ArgumentError
from pegrad.rules.conv.geometry import Geometry, pad

Kernel = Callable[..., Tensor]
"""`(x, g, geometry, images=1) -> stacked`"""


def grouped(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Tensor:
    """One grouped convolution, one dimension up, with the output gradients as its filters.

    Each (example, group) pair is a group of its own; its input has one channel for each image, whose extra axis is the
    channels `C/groups`, its filters are the group's rows of `g`. Stride and dilation change places.

    Source: Rochette, Manoel & Tramel 2019, Algorithms 1 and 2.

    Raises:
        ArgumentError: for three spatial axes, since PyTorch has no four-dimensional convolution.
    """
    if geometry.ndim == 3:
        raise ArgumentError(
            "The grouped kernel is a convolution one dimension up, and there is no conv4d: use another for 3d"
        )
    batch, channels = x.shape[0] // images, x.shape[1]
    groups, depth = geometry.groups, channels // geometry.groups
    up = F.conv2d if geometry.ndim == 1 else F.conv3d
    volume = x.reshape(batch, images, groups, depth, *x.shape[2:]).transpose(1, 2)
    volume = volume.reshape(1, batch * groups * images, depth, *x.shape[2:])
    filters = by_channel(g, images).flatten(0, 1).unsqueeze(2)
    out = up(
        volume,
        filters,
        stride=(1, *geometry.dilation),
        padding=(0, *geometry.padding),
        dilation=(1, *geometry.stride),
        groups=batch * groups,
    )
    for axis, size in enumerate(geometry.kernel):
        out = out.narrow(axis + 3, 0, size)  # a stride that does not divide reads past the kernel
    return out.reshape(batch, g.shape[1], depth, *geometry.kernel)


def grouped_backward(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Tensor:
    """The native weight gradient of one convolution in which every example is a group of its own."""
    batch = x.shape[0] // images
    apart = Geometry(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, batch * geometry.groups)
    side_by_side = (t.unflatten(0, (batch, images)).transpose(0, 1).flatten(1, 2) for t in (x, g))
    return apart.weight_gradient(*side_by_side).reshape(batch, g.shape[1], -1, *geometry.kernel)


def unfold(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Tensor:
    """One batched matrix product of the output gradients with the unfolded (im2col) input."""
    batch, nd = x.shape[0] // images, geometry.ndim
    kernel_first = (0, 2, *range(3 + nd, 3 + 2 * nd), 1, *range(3, 3 + nd))
    columns = windows(x, geometry).unflatten(0, (batch, images)).permute(kernel_first)
    lines = by_channel(g, images).reshape(batch * geometry.groups, g.shape[1] // geometry.groups, -1)
    columns = columns.reshape(batch * geometry.groups, -1, lines.shape[2])
    return (lines @ columns.mT).reshape(batch, g.shape[1], -1, *geometry.kernel)


def offset(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Tensor:
    """One batched matrix product for each kernel offset, on strided views: no im2col.

    With channels last and one row for each input position, the rows that a kernel offset reads start at one
    place and lie one after another, but for the row ends; there `g` is given zeros. A stride s splits the
    input into s interleaved phases first, within each of which the stride is 1. Images lie one after another.
    """
    rows, starts = _phase_rows(x, geometry, images)
    lines = _gradient_lines(g, geometry, x.shape[2:], images)
    length = lines.shape[-1]
    parts = [lines @ rows[phase].narrow(1, start, length) for phase, start in starts]
    stacked = torch.stack(parts, dim=-1)  # (B * groups, D / groups, C / groups, K)
    return stacked.reshape(x.shape[0] // images, g.shape[1], -1, *geometry.kernel)


def loop(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> Tensor:
    """The native weight gradient, one example at a time."""
    examples = zip(x.split(images), g.split(images), strict=True)
    return torch.stack([geometry.weight_gradient(*example) for example in examples])


KERNELS: dict[str, Kernel] = {
    "grouped": grouped,
    "grouped_backward": grouped_backward,
    "unfold": unfold,
    "offset": offset,
    "loop": loop,
}


def by_channel(t: Tensor, images: int) -> Tensor:
    """Put the channels before an example's images: `(B * N, C, *size)` to `(B, C, N, *size)`."""
    return t.unflatten(0, (-1, images)).transpose(1, 2)


def windows(x: Tensor, geometry: Geometry) -> Tensor:
    """View the padded input by output position and kernel offset: `(B, C, *output, *kernel)`."""
    view = pad(x, [width for p in reversed(geometry.padding) for width in (p, p)])
    for axis, (k, s, d) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        view = view.unfold(axis + 2, d * (k - 1) + 1, s)[..., ::d]
    return view


def _phase_rows(x: Tensor, geometry: Geometry, images: int) -> tuple[dict[tuple[int, ...], Tensor], list]:
    """Split the padded input by stride phase; each phase one matrix `(B * groups, rows, C / groups)`."""
    grid = _grid(x.shape[2:], geometry)
    widths: list[int] = []
    for n, p, s, w in reversed(list(zip(x.shape[2:], geometry.padding, geometry.stride, grid, strict=True))):
        widths += [p, w * s - n - p]
    padded = pad(x, widths)
    batch, groups, nd = x.shape[0] // images, geometry.groups, geometry.ndim
    split = [size for w, s in zip(grid, geometry.stride, strict=True) for size in (w, s)]
    phases = padded.reshape(batch, images, groups, -1, *split)
    order = [*range(5, 5 + 2 * nd, 2), 0, 2, 1, *range(4, 4 + 2 * nd, 2), 3]
    phases = phases.permute(order).reshape(*geometry.stride, batch * groups, images * prod(grid), -1)
    row_steps = [prod(grid[axis + 1 :]) for axis in range(nd)]
    starts = []
    for k in product(*map(range, geometry.kernel)):
        at = [d * i for d, i in zip(geometry.dilation, k, strict=True)]
        phase = tuple(a % s for a, s in zip(at, geometry.stride, strict=True))
        start = sum((a // s) * r for a, s, r in zip(at, geometry.stride, row_steps, strict=True))
        starts.append((phase, start))
    return {phase: phases[phase] for phase, _ in starts}, starts


def _gradient_lines(g: Tensor, geometry: Geometry, size: tuple[int, ...], images: int) -> Tensor:
    """Lay `g` out on the input's row grid, zeros where a row ends: `(B * groups, D / groups, length)`."""
    grid = _grid(size, geometry)
    output = g.shape[2:]
    widths = [width for w, o in zip(reversed(grid), reversed(output), strict=True) for width in (0, w - o)]
    if images == 1:
        widths[-1] = 0
    lines = by_channel(pad(g, widths), images).flatten(2)
    last = sum((o - 1) * prod(grid[axis + 1 :]) for axis, o in enumerate(output))
    length = (images - 1) * prod(grid) + last + 1
    return lines[:, :, :length].reshape(lines.shape[0] * geometry.groups, -1, length)


def _grid(size: tuple[int, ...], geometry: Geometry) -> list[int]:
    """Positions on each axis of one stride phase of the padded input."""
    return [-(-(n + 2 * p) // s) for n, p, s in zip(size, geometry.padding, geometry.stride, strict=True)]
