"""Which kernel finds a site's norms, and which its weighted sum: the cheapest, by estimate or as measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from pegrad.rules.costs import Work, nanoseconds
from pegrad.rules.site import Kernel, Shape, Site

Timings = Mapping[str, float]
"""Measured times in nanoseconds, by `timing_key`."""


@dataclass(frozen=True)
class Candidate:
    """One way to the norms and the weighted sum of a site.

    Args:
        norm: name of the kernel that finds the norms.
        stacks: whether that kernel stacks gradients.
        keeps: whether the sum is a contraction of those, kept; otherwise it is computed natively.
        norm_time: nanoseconds for the norms.
        sum_time: nanoseconds for the sum.
        numbers: how many numbers are kept.
    """

    norm: str
    stacks: bool
    keeps: bool
    norm_time: float
    sum_time: float
    numbers: int

    @property
    def time(self) -> float:
        """Nanoseconds for both."""
        return self.norm_time + self.sum_time

    @property
    def name(self) -> str:
        """Both kernels, as `explain` shows them."""
        return f"{self.norm} + {'contract' if self.keeps else 'native'}"


def candidates(site: Site, x: Shape, g: Shape, timings: Timings) -> list[Candidate]:
    """List every way to a site's norms and sum, the cheapest first.

    Args:
        site: the site.
        x: shape of its input, physical.
        g: shape of the gradient at its output, physical.
        timings: what has been measured; the rest is estimated.
    """
    device = site.source.device.type

    def time(name: str, kernel: Kernel) -> float:
        measured = timings.get(timing_key(site, x, g, name))
        return nanoseconds(kernel.rates, kernel.work, device) if measured is None else measured

    native = site.summing(x, g) if site.bounded else None
    native_time = time("native", native) if native else None
    found = []
    for name, kernel in site.stacking(x, g).items():
        numbers = stacked_numbers(site, kernel, x)
        square = nanoseconds("reduce", Work(0, moved=numbers), device)
        held = max(0, numbers - prod(x) - prod(g))
        contract = nanoseconds("contract", Work(0, moved=numbers), device)
        contract += nanoseconds("hold", Work(0, moved=held), device)
        found.append(Candidate(name, True, True, time(name, kernel) + square, contract, numbers))
        if native_time is not None:
            found.append(Candidate(name, True, False, time(name, kernel) + square, native_time, prod(x) + prod(g)))
    for name, kernel in site.norming(x, g).items():
        if native_time is not None:
            found.append(Candidate(name, False, False, time(name, kernel), native_time, prod(x) + prod(g)))
    return sorted(found, key=lambda candidate: candidate.time)


def choose(site: Site, x: Shape, g: Shape, timings: Timings, *, keep: bool) -> Candidate:
    """Pick the cheapest way to a site's norms and sum.

    Args:
        site: the site.
        x: shape of its input, physical.
        g: shape of the gradient at its output, physical.
        timings: what has been measured; the rest is estimated.
        keep: whether something may be kept for the sum. If so, the cheapest way to both is picked, among those that
            keep no more than a small multiple of input and output gradient; if not, the cheapest way to the norms.
    """
    options = candidates(site, x, g, timings)
    if not keep:
        return min(options, key=lambda candidate: (candidate.norm_time, candidate.keeps))
    room = 2.5 * (prod(x) + prod(g))
    return next((c for c in options if c.numbers <= room), options[0])


def stack_kernel(site: Site, x: Tensor, g: Tensor) -> Kernel:
    """Pick the cheapest kernel that stacks a site's gradients, by estimate."""
    shapes = tuple(x.shape), tuple(g.shape)
    return site.stacking(*shapes)[stack_name(site, *shapes, x.device.type)]


def stack_name(site: Site, x: Shape, g: Shape, device: str) -> str:
    """Name the kernel that `stack_kernel` picks."""
    kernels = site.stacking(x, g)
    return min(kernels, key=lambda name: nanoseconds(kernels[name].rates, kernels[name].work, device))


def stacked_numbers(site: Site, kernel: Kernel, x: Shape) -> int:
    """Count the numbers of a site's stacked gradients, for a batch of as many rows as `x` has."""
    return int(kernel.work.written) or x[0] * site.source.numel()


def timing_key(site: Site, x: Shape, g: Shape, kernel: str) -> str:
    """Name a kernel at a site of these shapes, for `Timings`."""
    return f"{site.describe()} {x} {g} {kernel}"
