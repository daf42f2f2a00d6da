"""What a kernel's work costs: a linear model, with constants for a device.

Every kernel counts its multiply-adds, the numbers it writes as its result, the numbers it moves on the way, and the
calls it makes. A device has a rate for each, in nanoseconds, kernel by kernel: a convolution's grouped backward and a
batched matrix product do the same multiply-adds at different speeds. The constants are fitted by
`benchmarks/fit_costs.py`; another machine shifts all of them, which changes choices near a crossover only, and
`pegrad.autotune` measures instead.
"""

from typing import NamedTuple


class Work(NamedTuple):
    """What a kernel does for given shapes."""

    multiply_adds: float
    written: float = 0.0
    moved: float = 0.0
    calls: float = 1.0


class Rates(NamedTuple):
    """What a kernel pays for each unit of its work, in nanoseconds."""

    multiply_add: float
    written: float
    moved: float
    call: float

    def time(self, work: Work) -> float:
        """Return the estimated time of `work` in nanoseconds."""
        return sum(rate * amount for rate, amount in zip(self, work, strict=True))


CPU: dict[str, Rates] = {
    "grouped": Rates(0.026, 0.59, 0.0, 0.0),
    "grouped_backward": Rates(0.0093, 0.61, 0.0, 1.1e6),
    "unfold": Rates(0.0077, 0.25, 0.7, 2.5e4),
    "offset": Rates(0.0089, 0.94, 2.0, 5.4e5),
    "loop": Rates(0.011, 0.82, 0.0, 1.0e5),
    "gram_unfolded": Rates(0.0056, 0.0, 1.8, 0.0),
    "gram_box": Rates(0.0076, 0.0, 0.29, 8.9e5),
    "native": Rates(0.0097, 0.29, 0.21, 1.5e4),
    "reduce": Rates(0.0, 0.0, 0.058, 1.0e4),
    "contract": Rates(0.0, 0.0, 0.1, 5800.0),
    "hold": Rates(0.0, 0.0, 1.0, 0.0),  # not fitted: the page faults of memory that is not free again at once
    "product": Rates(0.01, 0.037, 0.0, 2.2e4),
    "gram": Rates(0.007, 0.0, 0.33, 1.7e4),
}
# Throughputs of a data-centre GPU's specification sheet, not fitted: a call costs as much as many multiply-adds.
CUDA: dict[str, Rates] = {
    "grouped": Rates(1e-4, 4e-3, 0.0, 3e4),
    "grouped_backward": Rates(1e-4, 4e-3, 0.0, 3e4),
    "unfold": Rates(4e-5, 3e-3, 4e-3, 3e4),
    "offset": Rates(4e-5, 6e-3, 4e-3, 2e4),
    "loop": Rates(4e-5, 3e-3, 0.0, 3e4),
    "gram_unfolded": Rates(4e-5, 0.0, 4e-3, 6e4),
    "gram_box": Rates(4e-5, 0.0, 4e-3, 1e5),
    "product": Rates(4e-5, 2e-3, 0.0, 2e4),
    "gram": Rates(4e-5, 0.0, 3e-3, 4e4),
    "reduce": Rates(0.0, 0.0, 2e-3, 1e4),
    "contract": Rates(0.0, 0.0, 2e-3, 1e4),
    "hold": Rates(0.0, 0.0, 0.0, 0.0),
    "native": Rates(4e-5, 2e-3, 2e-3, 2e4),
}


def nanoseconds(kernel: str, work: Work, device: str) -> float:
    """Estimate the time of a kernel's work on a device of that type (`cuda`, or anything else for `cpu`)."""
    return (CUDA if device == "cuda" else CPU)[kernel].time(work)
