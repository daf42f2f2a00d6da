"""A bias: what an operation adds to every position of its output."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from pegrad.rules.costs import Work
from pegrad.rules.site import Kernel, Shape, Site

Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bias(Site):
    """A bias over the channels of an operation's output.

    Its gradient is the *sum* of `g` over positions, so its norm is that of the sum, not the sum of norms.

    Args:
        source: see `Site`.
        operation: see `Site`.
        reduce: sums over positions, `g` to `(B, *source.shape)`.
    """

    reduce: Reduction

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        return {"sum": Kernel("reduce", Work(0, moved=prod(g)), lambda x, g: self.reduce(g))}


def over_leading(channel_axes: int) -> Reduction:
    """Sum `(B, *positions, *channels)` to `(B, *channels)`."""

    def reduce(g: Tensor) -> Tensor:
        positions = list(range(1, g.dim() - channel_axes))
        return g.sum(positions) if positions else g

    return reduce


def over_images(images: int) -> Reduction:
    """Sum `(B * images, C, *positions)` to `(B, C)`."""

    def reduce(g: Tensor) -> Tensor:
        g = g.flatten(2).sum(2) if g.dim() > 2 else g
        return g if images == 1 else g.unflatten(0, (-1, images)).sum(1)

    return reduce
