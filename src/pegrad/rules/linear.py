"""The linear map `y = x Wᵀ`, in terms of which other products with a parameter are put."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.bias import Bias, over_leading
from pegrad.rules.costs import Work
from pegrad.rules.gram import Gram, gram, gram_norm
from pegrad.rules.site import Kernel, Recorder, Rule, Shape, Site, Tap, weigh_the_smaller


@dataclass(frozen=True, eq=False)
class LinearWeight(Site):
    """The weight `(p, D)` of `y = x Wᵀ` over T positions: its gradient is `gᵀ x`.

    Args:
        source: see `Site`.
        operation: see `Site`.
        gram_of_g: makes the Gram matrix of `g`.
    """

    gram_of_g: Gram = gram

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        written = x[0] * x[-1] * g[-1]
        work = Work(written * prod(x[1:-1]), written)
        return {"product": Kernel("product", work, lambda x, g: _rows(g).mT @ _rows(x))}

    def norming(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.norming`."""
        pairs = x[0] * prod(x[1:-1]) ** 2
        work = Work(pairs * (x[-1] + g[-1]), moved=2 * pairs + prod(x) + prod(g))
        return {"gram": Kernel("gram", work, lambda x, g: gram_norm(_rows(x), _rows(g), gram_of_g=self.gram_of_g))}

    def summing(self, x: Shape, g: Shape) -> Kernel:
        """See `Site.summing`."""
        work = Work(prod(x) * g[-1], x[-1] * g[-1], prod(g))
        return Kernel("native", work, lambda x, g: _outer(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])))

    def positions(self, x: Shape, g: Shape) -> int:
        """See `Site.positions`."""
        return prod(g[1:-1])

    def amplitude(self, x: Tensor, g: Tensor, positions: int) -> Tensor:
        """See `Site.amplitude`; by the inequality of Cauchy and Schwarz."""
        return x * g

    def weigh(self, x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `Site.weigh`."""
        return weigh_the_smaller(x, g, weights)

    def kind(self, x: Shape, g: Shape) -> Hashable:
        """See `Site.kind`."""
        return "linear"

    def joined(self, uses: Sequence[tuple[Tensor, Tensor]], batch: int) -> tuple[Site, Tensor, Tensor]:
        """See `Site.joined`."""
        x, g = (torch.cat([_rows(t) for t in parts], 1) for parts in zip(*uses, strict=True))
        return self, x, g

    def turned(self, source: Tensor, x: Tensor, g: Tensor) -> tuple[Site, Tensor, Tensor]:
        """See `Site.turned`: input and gradient at the output change places."""
        return replace(self, source=source), g, x

    def factors(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """See `Site.factors`."""
        return _rows(g), _rows(x)

    def apply(self, x: Tensor, parameter: Tensor) -> Tensor:
        """See `Site.apply`."""
        return F.linear(x, parameter)

    def pairs(self, x: Tensor, g: Tensor) -> Tensor | None:
        """See `Site.pairs`."""
        x, g = _rows(x), _rows(g)
        batch, positions = x.shape[:2]
        if positions**2 * (x.shape[2] + g.shape[2]) > x.shape[2] * g.shape[2]:
            return None
        if positions > 1:  # terms may cancel: the answer is a difference of large products
            x, g = x.double(), g.double()
        products = (x.flatten(0, 1) @ x.flatten(0, 1).T).mul_(g.flatten(0, 1) @ g.flatten(0, 1).T)
        return products.reshape(batch, positions, batch, positions).sum((1, 3))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum outer products of rows, `leftᵀ right`: of many rows in the order that is the faster, the wider first."""
    if right.shape[1] > left.shape[1] and len(left) >= _MANY_ROWS:
        return (right.mT @ left).mT.contiguous()
    return left.mT @ right


_MANY_ROWS = 2048  # which take longer to multiply, the narrower first, than a sum takes to be transposed


def _rows(t: Tensor) -> Tensor:
    """Take all middle axes for positions: `(B, T, channels)`."""
    return t.flatten(1, -2) if t.dim() > 2 else t[:, None]


def linear(trace: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Rule of `F.linear`."""
    if not trace.is_parameter(weight) or not trace.is_batched(input) or weight.dim() != 2:
        return NotImplemented
    if not weight.numel() or not input.numel():
        return NotImplemented
    fused = bias if bias is not None and trace.is_parameter(bias) else None

    def run(x: Tensor, tap: Tap) -> Tensor:
        y = F.linear(x, weight.detach(), None if fused is None else fused.detach())
        sites: list[Site] = [LinearWeight(weight, "linear")]
        if fused is not None:
            sites.append(Bias(fused, "linear bias", over_leading(1)))
        return tap(y, x, sites)

    y = trace.record(run, input)
    return y if bias is None or fused is not None else y + bias


RULES: dict[Any, Rule] = {F.linear: linear}
