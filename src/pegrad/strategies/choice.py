"""Which kernel finds a site's norms, and which its clipped sum: the cheapest by estimate."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from pegrad.rules.costs import Work, nanoseconds
from pegrad.rules.site import Kernel, Shape, Site


@dataclass(frozen=True)
class Candidate:
    """One way to the norms and the clipped sum of a site.

    Args:
        norm: name of the kernel that finds the norms.
        stacks: whether that kernel stacks gradients.
        keeps: whether the sum is a contraction of those, kept; otherwise it is computed natively.
        norm_time: estimate for the norms, nanoseconds.
        sum_time: estimate for the sum, nanoseconds.
        numbers: how many numbers are stacked.
    """

    norm: str
    stacks: bool
    keeps: bool
    norm_time: float
    sum_time: float
    numbers: int

    @property
    def time(self) -> float:
        """Estimate for both, nanoseconds."""
        return self.norm_time + self.sum_time


def candidates(site: Site, x: Shape, g: Shape, device: str) -> list[Candidate]:
    """List every way to a site's norms and sum, the cheapest first.

    Args:
        site: the site.
        x: shape of its input, physical.
        g: shape of the gradient at its output, physical.
        device: type of the device.
    """
    batch = x[0]
    native = site.summing(x, g)
    native_time = _time(native, device) if native else None
    found = []
    for name, kernel in site.stacking(x, g).items():
        numbers = batch * site.source.numel()
        square = nanoseconds("reduce", Work(0, moved=numbers), device)
        time = _time(kernel, device) + square
        contract = nanoseconds("contract", Work(0, moved=numbers), device)
        found.append(Candidate(name, True, True, time, contract, numbers))
        if native_time is not None:
            found.append(Candidate(name, True, False, time, native_time, numbers))
    for name, kernel in site.norming(x, g).items():
        if native_time is not None:
            found.append(Candidate(name, False, False, _time(kernel, device), native_time, 0))
    return sorted(found, key=lambda c: c.time)


def choose(site: Site, x: Shape, g: Shape, device: str, *, keep: bool) -> Candidate:
    """Pick the cheapest way to a site's norms and sum.

    Args:
        site: the site.
        x: shape of its input, physical.
        g: shape of the gradient at its output, physical.
        device: type of the device.
        keep: whether stacked gradients may be kept for the sum. They are only where they hold no more than a small
            multiple of the numbers that the sum would need in their place.
    """
    room = 2 * (prod(x) + prod(g)) if keep else 0
    options = candidates(site, x, g, device)
    allowed = [c for c in options if not c.keeps or c.numbers <= room]
    return (allowed or options)[0]


def _time(kernel: Kernel, device: str) -> float:
    return nanoseconds(kernel.rates, kernel.work, device)


def stack_kernel(site: Site, x: Tensor, g: Tensor) -> Kernel:
    """Pick the cheapest kernel that stacks a site's gradients."""
    kernels = site.stacking(tuple(x.shape), tuple(g.shape)).values()
    return min(kernels, key=lambda kernel: _time(kernel, x.device.type))
