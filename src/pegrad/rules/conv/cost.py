"""Which weight gradient kernel is the cheapest for a call, by a model of its cost.

The model is linear: every kernel does the same multiply-adds but at its own rate, writes the same stacked result but
through its own number of copies, and pays for the calls that it makes. The constants are times in nanoseconds, fitted
by `benchmarks/fit_kernel_costs.py` on the machine that `benchmarks/results/kernel_costs.json` names; another machine
shifts all of them, which changes choices near a crossover only.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from pegrad.rules.conv.geometry import Geometry


@dataclass(frozen=True)
class Rates:
    """What a kernel pays, in nanoseconds, for each unit of work."""

    multiply_add: float
    result: float  # each element of the stacked result
    columns: float  # each element of the kernel's unfolded or rearranged input
    call: float


CPU: dict[str, Rates] = {
    "grouped": Rates(0.016, 2.6, 0.0, 2e4),
    "grouped_backward": Rates(0.007, 3.5, 0.0, 2e4),
    "unfold": Rates(0.010, 1.2, 1.0, 2e4),
    "offset": Rates(0.010, 2.0, 1.0, 1e4),
    "loop": Rates(0.007, 1.3, 0.0, 3e4),
}


def choose(x: Tensor, g: Tensor, geometry: Geometry) -> str:
    """Name the kernel that costs least for these shapes.

    Args:
        x: input, `(B, C, *size)`.
        g: output gradient, `(B, D, *output)`.
        geometry: the convolution.

    Returns:
        A key of `KERNELS`. It depends on this call's shapes alone.
    """
    costs = estimates(x.shape, g.shape, geometry)
    return min(costs, key=costs.__getitem__)


def estimates(x: tuple[int, ...], g: tuple[int, ...], geometry: Geometry) -> dict[str, float]:
    """Estimate each kernel's time in nanoseconds from the shapes of its arguments."""
    batch, channels, *size = x
    positions = prod(g[2:])
    offsets = prod(geometry.kernel)
    result = batch * g[1] * (channels // geometry.groups) * offsets
    padded = batch * channels * prod(n + 2 * p for n, p in zip(size, geometry.padding, strict=True))
    columns = {"unfold": batch * channels * offsets * positions, "offset": padded}
    calls = {"offset": offsets, "loop": batch}
    available = {name: rates for name, rates in CPU.items() if not (name == "grouped" and geometry.ndim == 3)}
    return {
        name: rates.multiply_add * result * positions
        + rates.result * result
        + rates.columns * columns.get(name, 0)
        + rates.call * calls.get(name, 1)
        for name, rates in available.items()
    }
