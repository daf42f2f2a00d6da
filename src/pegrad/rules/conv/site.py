"""A convolution's weight: three answers from the kernels of this folder."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from pegrad.rules.conv import cost
from pegrad.rules.conv.geometry import Geometry
from pegrad.rules.conv.kernels import KERNELS
from pegrad.rules.conv.norms import gram_box, gram_unfolded
from pegrad.rules.site import Kernel, Shape, Site, weigh_the_smaller

T = TypeVar("T")
NORMS = {"gram_unfolded": gram_unfolded, "gram_box": gram_box}


@dataclass(frozen=True, eq=False)
class ConvWeight(Site):
    """The weight of a convolution, plain or transposed.

    Args:
        source: see `Site`.
        operation: see `Site`.
        geometry: the convolution's, or for a transposed one that of the convolution whose input gradient it is.
        transposed: whether input and output gradient change places.
        images: images of one example, N: `x` and `g` are `(B * N, ...)`.
    """

    geometry: Geometry
    transposed: bool = False
    images: int = 1

    def describe(self) -> str:
        """See `Site.describe`."""
        g = self.geometry
        images = f" images={self.images}" if self.images != 1 else ""
        return f"{self.operation} k={g.kernel} s={g.stride} p={g.padding} d={g.dilation} groups={g.groups}{images}"

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        work = cost.stacking(*self._roles(x, g), self.geometry, self.images)
        return {name: Kernel(name, w, self._kernel(KERNELS[name])) for name, w in work.items()}

    def norming(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.norming`."""
        work = cost.gramming(*self._roles(x, g), self.geometry, self.images)
        return {name: Kernel(name, w, self._kernel(NORMS[name])) for name, w in work.items()}

    def summing(self, x: Shape, g: Shape) -> Kernel:
        """See `Site.summing`."""
        work = cost.summing(*self._roles(x, g), self.geometry)
        return Kernel("native", work, lambda x, g: self.geometry.weight_gradient(*self._roles(x, g)))

    def positions(self, x: Shape, g: Shape) -> int:
        """See `Site.positions`."""
        return self.images * prod(self._roles(x, g)[1][2:])

    def amplitude(self, x: Tensor, g: Tensor, positions: int) -> Tensor:
        """See `Site.amplitude`; by Cauchy and Schwarz, each input being in as many windows as a kernel has numbers."""
        return (x * g).reshape(-1, self.images).sum(1) * prod(self.geometry.kernel) ** 0.5

    def rows_at_a_time(self, positions: int) -> int:
        """See `Site.rows_at_a_time`: a convolution's weight gradient adds naively over positions and examples."""
        return max(1, 4096 // positions) if positions >= 256 else super().rows_at_a_time(positions)

    def exact(self, x: Tensor, g: Tensor) -> Tensor:
        """See `Site.exact`; by matrix products, for a float64 convolution is slow."""
        return self._kernel(KERNELS["unfold"])(x, g)

    def weigh(self, x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `Site.weigh`."""
        return weigh_the_smaller(x, g, weights)

    def kind(self, x: Shape, g: Shape) -> Hashable:
        """See `Site.kind`."""
        return self.geometry, self.transposed, x[1:], g[1:]

    def joined(self, uses: Sequence[tuple[Tensor, Tensor]], batch: int) -> tuple[Site, Tensor, Tensor]:
        """See `Site.joined`: all are images of one example."""
        x, g = (
            torch.cat([t.unflatten(0, (batch, -1)) for t in parts], 1).flatten(0, 1)
            for parts in zip(*uses, strict=True)
        )
        return replace(self, images=x.shape[0] // batch), x, g

    def apply(self, x: Tensor, parameter: Tensor) -> Tensor | None:
        """See `Site.apply`."""
        return None if self.transposed else self.geometry.forward(x, parameter)

    def _kernel(self, kernel: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
        return lambda x, g: kernel(*self._roles(x, g), self.geometry, self.images)

    def _roles(self, x: T, g: T) -> tuple[T, T]:
        return (g, x) if self.transposed else (x, g)
