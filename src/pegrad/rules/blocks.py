"""Linear maps side by side, each with inputs and a weight of its own: batched products, mixtures of experts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pegrad.rules.costs import Work
from pegrad.rules.gram import gram_norm
from pegrad.rules.site import Kernel, Recorder, Shape, Site, Tap, weigh_the_smaller


@dataclass(frozen=True, eq=False)
class BlockWeights(Site):
    """The weights `(E, p, D)` of `y[e] = x[e] W[e]ᵀ` over T positions: `x` is `(B, E, T, D)`, `g` `(B, E, T, p)`."""

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        batch, blocks, positions, width = x
        written = batch * blocks * width * g[-1]
        return {"product": Kernel("product", Work(written * positions, written), lambda x, g: g.mT @ x)}

    def norming(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.norming`; what belongs to different blocks does not interfere."""
        batch, blocks, positions, width = x
        pairs = batch * blocks * positions**2
        work = Work(pairs * (width + g[-1]), moved=2 * pairs + batch * blocks * positions * (width + g[-1]))
        return {
            "gram": Kernel("gram", work, lambda x, g: gram_norm(x.flatten(0, 1), g.flatten(0, 1)).over_groups(blocks))
        }

    def summing(self, x: Shape, g: Shape) -> Kernel:
        """See `Site.summing`."""
        batch, blocks, positions, width = x
        lines = batch * blocks * positions
        work = Work(lines * width * g[-1], blocks * width * g[-1], lines * (width + g[-1]))
        return Kernel("native", work, lambda x, g: _lines(g).mT @ _lines(x))

    def positions(self, x: Shape, g: Shape) -> int:
        """See `Site.positions`."""
        return x[2]

    def amplitude(self, x: Tensor, g: Tensor, positions: int) -> Tensor:
        """See `Site.amplitude`; by the inequality of Cauchy and Schwarz."""
        return x * g

    def weigh(self, x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `Site.weigh`."""
        return weigh_the_smaller(x, g, weights)

    def apply(self, x: Tensor, parameter: Tensor) -> Tensor:
        """See `Site.apply`."""
        return _products(x, parameter)


def _lines(t: Tensor) -> Tensor:
    """Put the positions of all examples under one another: `(B, E, T, channels)` to `(E, B * T, channels)`."""
    return t.transpose(0, 1).flatten(1, 2)


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `x` `(B, E, T, D)` by `weight` `(E, p, D)`, of which `matmul` would make B copies."""
    return (_lines(x) @ weight.mT).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def blocks(trace: Recorder, name: str, input: Tensor, weight: Tensor) -> Any:
    """Record `y[e] = input[e] weight[e]ᵀ`: `(E, T, D)` and a parameter `(E, p, D)` to `(E, T, p)`."""
    if not trace.is_parameter(weight) or not trace.is_batched(input) or not weight.numel() or not input.numel():
        return NotImplemented

    def run(x: Tensor, tap: Tap) -> Tensor:
        return tap(_products(x, weight.detach()), x, [BlockWeights(weight, name)])

    return trace.record(run, input)
