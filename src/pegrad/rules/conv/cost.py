"""What each convolution kernel does, counted from the shapes; and which gradient kernel is the cheapest."""

from functools import lru_cache
from math import prod

from torch import Tensor

from pegrad.rules.conv.geometry import Geometry
from pegrad.rules.costs import Work, nanoseconds

Shape = tuple[int, ...]
_REMEMBERED = 1024  # shapes
_LANES = 16  # a grouped convolution's backward fills the channels of each group up to a multiple of these


def choose(x: Tensor, g: Tensor, geometry: Geometry, images: int = 1) -> str:
    """Name the stacked gradient's kernel that costs least for these shapes.

    Args:
        x: input, `(B * images, C, *size)`.
        g: output gradient, `(B * images, D, *output)`.
        geometry: the convolution.
        images: how many images an example has.

    Returns:
        A key of `KERNELS`. It depends on this call's shapes alone.
    """
    work = stacking(tuple(x.shape), tuple(g.shape), geometry, images)
    return min(work, key=lambda name: nanoseconds(name, work[name], x.device.type))


@lru_cache(_REMEMBERED)
def stacking(x: Shape, g: Shape, geometry: Geometry, images: int = 1) -> dict[str, Work]:
    """Count the work of each kernel that stacks gradients, for those that exist in this number of dimensions."""
    batch, positions, offsets = x[0] // images, images * prod(g[2:]), prod(geometry.kernel)
    result = batch * g[1] * (x[1] // geometry.groups) * offsets
    multiply_adds = result * positions
    filled = prod(-(-n // _LANES) * _LANES / n for n in (x[1] // geometry.groups, g[1] // geometry.groups))
    work = {
        "grouped": Work(multiply_adds, result),
        "grouped_backward": Work(multiply_adds * filled, result),
        "unfold": Work(multiply_adds, result, batch * x[1] * offsets * positions),
        "offset": Work(multiply_adds, result, prod(x), offsets),
        "loop": Work(multiply_adds, result, calls=batch),
    }
    if geometry.ndim == 3:
        del work["grouped"]
    return work


@lru_cache(_REMEMBERED)
def gramming(x: Shape, g: Shape, geometry: Geometry, images: int = 1) -> dict[str, Work]:
    """Count the work of each kernel that finds norms from Gram matrices."""
    batch, positions, offsets, groups = x[0] // images, images * prod(g[2:]), prod(geometry.kernel), geometry.groups
    padded = prod(n + 2 * p for n, p in zip(x[2:], geometry.padding, strict=True))
    pairs = positions**2
    ordered = images * (images + 1) / 2  # pairs of images, each in one order
    pixels, outputs = ordered * padded**2, ordered * prod(g[2:]) ** 2
    return {
        "gram_unfolded": Work(
            batch * pairs * (x[1] * offsets + g[1]), moved=batch * (x[1] * offsets * positions + 3 * groups * pairs)
        ),
        "gram_box": Work(
            batch * (pixels * x[1] + outputs * g[1]),
            moved=batch * groups * (pixels + (sum(geometry.kernel) + 2) * outputs),
            calls=images,
        ),
    }


@lru_cache(_REMEMBERED)
def summing(x: Shape, g: Shape, geometry: Geometry) -> Work:
    """Count the work of the native weight gradient of the weighted batch."""
    multiply_adds = prod(g) * (x[1] // geometry.groups) * prod(geometry.kernel)
    return Work(multiply_adds, g[1] * (x[1] // geometry.groups) * prod(geometry.kernel), prod(g))
