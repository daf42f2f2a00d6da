"""Linear maps and matrix products with a parameter: all of them put in terms of `y = x Wᵀ`."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.bias import Bias, over_leading
from pegrad.rules.costs import Work
from pegrad.rules.gram import gram_norm
from pegrad.rules.site import Kernel, Recorder, Rule, Shape, Site, Tap, weigh_the_smaller


@dataclass(frozen=True, eq=False)
class LinearWeight(Site):
    """The weight `(p, D)` of `y = x Wᵀ` over T positions: its gradient is `gᵀ x`."""

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        written = x[0] * x[-1] * g[-1]
        work = Work(written * prod(x[1:-1]), written)
        return {"product": Kernel("product", work, lambda x, g: _rows(g).mT @ _rows(x))}

    def norming(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.norming`."""
        pairs = x[0] * prod(x[1:-1]) ** 2
        work = Work(pairs * (x[-1] + g[-1]), moved=2 * pairs + prod(x) + prod(g))
        return {"gram": Kernel("gram", work, lambda x, g: gram_norm(_rows(x), _rows(g)))}

    def summing(self, x: Shape, g: Shape) -> Kernel:
        """See `Site.summing`."""
        work = Work(prod(x) * g[-1], x[-1] * g[-1], prod(g))
        return Kernel("native", work, lambda x, g: g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1]))

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
        products = (x.flatten(0, 1) @ x.flatten(0, 1).T).mul_(g.flatten(0, 1) @ g.flatten(0, 1).T)
        return products.reshape(batch, positions, batch, positions).sum((1, 3))


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


def matmul(trace: Recorder, input: Tensor, other: Tensor) -> Any:
    """Rule of `torch.matmul`, `mm`, `mv` and `@`: a parameter of one or two axes, on either side."""
    if trace.is_parameter(other):
        x, weight = input, other.mT if other.dim() == 2 else other
    else:
        x, weight = other.mT if other.dim() > 1 else other, input
    if weight.dim() > 2 or x.dim() == 0:
        return NotImplemented
    y = linear(trace, x, weight if weight.dim() == 2 else weight[None])
    if y is NotImplemented:
        return y
    if weight.dim() == 1:
        return y.squeeze(-1)
    return y.mT if x is not input and x.dim() > 1 else y


def addmm(trace: Recorder, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Rule of `torch.addmm`."""
    y = matmul(trace, mat1, mat2)
    if y is NotImplemented:
        return y
    return beta * (trace.expand(input, y) if trace.is_parameter(input) else input) + alpha * y


def einsum(trace: Recorder, equation: str, *operands: Any) -> Any:
    """Rule of `torch.einsum` with two operands, one a parameter that has no index of its own kept per position."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation or len(tensors) != 2:
        return NotImplemented
    inputs, out = equation.split("->")
    labels = inputs.split(",")
    at = 1 if trace.is_parameter(tensors[1]) else 0
    (x, xs), (w, ws) = (tensors[1 - at], labels[1 - at]), (tensors[at], labels[at])
    shared = [i for i in ws if i in xs]
    own = [i for i in ws if i not in xs]
    positions = [i for i in xs if i not in ws]
    repeated = any(len(set(group)) != len(group) for group in (xs, ws, out))
    if repeated or any(i in out for i in shared) or set(out) != set(own + positions):
        return NotImplemented
    if not w.numel() or not x.numel():
        return NotImplemented
    rows = torch.einsum(f"{xs}->{''.join(positions + shared)}", x)
    matrix = torch.einsum(f"{ws}->{''.join(own + shared)}", w)
    kept, made = list(rows.shape[: len(positions)]), list(matrix.shape[: len(own)])
    y = linear(trace, rows.reshape(*kept, -1), matrix.reshape(prod(made), -1))
    return y if y is NotImplemented else torch.einsum(f"{''.join(positions + own)}->{out}", y.reshape(kept + made))


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    torch.mv: matmul,
    torch.Tensor.mv: matmul,
    torch.Tensor.__rmatmul__: lambda trace, self, other: matmul(trace, other, self),
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.einsum: einsum,
    torch.functional.einsum: einsum,
}
