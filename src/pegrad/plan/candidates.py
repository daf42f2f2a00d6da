"""The ways to the norms and the weighted sum of a parameter's uses, and the cheapest: by estimate or as measured."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.rules.costs import Work, nanoseconds
from pegrad.rules.site import Kernel, Shape, Site

Timings = Mapping[str, float]
"""Measured times in nanoseconds, by `timing_key`."""


class Shaped(NamedTuple):
    """One use, or several of one kind taken for one, before there is anything but shapes."""

    site: Site
    x: Shape
    g: Shape
    dtype: torch.dtype
    """Of the input."""
    outer: bool = False
    """Whether its gradients are known as sums of outer products."""

    @property
    def numbers(self) -> int:
        """Numbers of input and gradient."""
        return prod(self.x) + prod(self.g)

    @property
    def key(self) -> Hashable:
        """All that its candidates depend on, but its kernels themselves."""
        site, x, g, dtype, outer = self
        return type(site), site.describe(), site.source.shape, site.source.device, x, g, dtype, outer


class Candidate(NamedTuple):
    """One way to the norms and the weighted sum of one parameter's gradients."""

    names: tuple[str, ...]
    """Names of the kernels that find the norms, one for each kind of use."""
    kernels: tuple[Kernel, ...]
    """Those kernels."""
    stacks: bool
    """Whether they stack gradients."""
    keeps: bool
    """Whether the sum is a contraction of those, kept; otherwise it is computed natively."""
    norm_time: float
    """Nanoseconds for the norms."""
    sum_time: float
    """Nanoseconds for the sum."""
    numbers: int
    """How many numbers are kept."""

    def __repr__(self) -> str:
        """Leave the kernels out: their names say it."""
        return f"Candidate({self.name}: {self.norm_time:.0f} + {self.sum_time:.0f} ns, {self.numbers} numbers)"

    @property
    def time(self) -> float:
        """Nanoseconds for both."""
        return self.norm_time + self.sum_time

    @property
    def norm(self) -> str:
        """The kernels that find the norms, as `explain` shows them."""
        return ", ".join(dict.fromkeys(self.names))

    @property
    def name(self) -> str:
        """Both kernels, as `explain` shows them."""
        return f"{self.norm} + {'contract' if self.keeps else 'native'}"


def candidates(uses: Sequence[Shaped], timings: Timings) -> list[Candidate]:
    """List every way to the norms and the sum of one parameter's gradients, the cheapest first.

    Args:
        uses: the uses of the parameter, those of one kind taken for one.
        timings: what has been measured; the rest is estimated.
    """
    device = uses[0].site.source.device.type
    numel = uses[0].site.source.numel()

    def time(use: Shaped, name: str, kernel: Kernel) -> float:
        measured = timings.get(timing_key(use.site, use.x, use.g, name))
        return nanoseconds(kernel.rates, kernel.work, device) if measured is None else measured

    def of_all(names: Sequence[str], kernels: Sequence[Kernel]) -> float:
        return sum(map(time, uses, names, kernels))

    natives = [use.site.summing(use.x, use.g) if use.site.bounded else None for use in uses]
    native_time = None
    if all(natives):
        native_time = of_all(["native"] * len(uses), [kernel for kernel in natives if kernel])
    held = sum(use.numbers for use in uses)
    found = []
    for names, kernels in _each_or_cheapest([use.site.stacking(use.x, use.g) for use in uses], time, uses):
        rows = [stacked_numbers(use.site, kernel, use.x) for use, kernel in zip(uses, kernels, strict=True)]
        numbers = max(rows)
        norm_time = of_all(names, kernels) + nanoseconds("reduce", Work(0, moved=numbers), device)
        norm_time += nanoseconds("reduce", Work(0, moved=2 * sum(rows[1:]), calls=len(rows) - 1), device)
        contract = nanoseconds("contract", Work(0, moved=numbers), device)
        contract += nanoseconds("hold", Work(0, moved=max(0, numbers - held), calls=0), device)
        found.append(Candidate(names, kernels, True, True, norm_time, contract, numbers))
        if native_time is not None:
            found.append(Candidate(names, kernels, True, False, norm_time, native_time, held))
    between = [_between(a, b, numel, device) for a, b in combinations(uses, 2)]
    if native_time is not None and all(use.outer for use in uses if between):
        for names, kernels in _each_or_cheapest([use.site.norming(use.x, use.g) for use in uses], time, uses):
            norm_time = of_all(names, kernels) + sum(between)
            found.append(Candidate(names, kernels, False, False, norm_time, native_time, held))
    return sorted(found, key=lambda candidate: candidate.time)


def choose(uses: Sequence[Shaped], timings: Timings, *, keep: bool) -> Candidate:
    """Pick the cheapest way to the norms and the sum of one parameter's gradients.

    Args:
        uses: the uses of the parameter, those of one kind taken for one.
        timings: what has been measured; the rest is estimated.
        keep: whether something may be kept for the sum. If so, the cheapest way to both is picked, among those that
            keep less than one and a half times what input and output gradient are; if not, the cheapest way to the
            norms.
    """
    options = candidates(uses, timings)
    if not keep:
        return min(options, key=lambda candidate: (candidate.norm_time, candidate.keeps))
    room = 1.5 * sum(use.numbers for use in uses)
    return next((c for c in options if c.numbers < room), options[0])


class Choices:
    """Picks as `choose` does, once for all uses of the same operations and shapes.

    Args:
        timings: see `choose`.
        keep: see `choose`.
    """

    def __init__(self, timings: Timings, *, keep: bool) -> None:
        self._timings = timings
        self._keep = keep
        self._picked: dict[Hashable, Candidate] = {}

    def __call__(self, uses: Sequence[Shaped]) -> Candidate:
        """See `choose`."""
        key = tuple(use.key for use in uses)
        picked = self._picked.get(key)
        if picked is None:
            picked = choose(uses, self._timings, keep=self._keep)
            if len(self._picked) == _REMEMBERED:
                self._picked.clear()
            self._picked[key] = picked._replace(kernels=())  # which know their site, which holds a parameter
            return picked
        kernels = []
        for use, name in zip(uses, picked.names, strict=True):
            offer = use.site.stacking(use.x, use.g) if picked.stacks else use.site.norming(use.x, use.g)
            kernels.append(offer[name])
        return picked._replace(kernels=tuple(kernels))


_REMEMBERED = 4096


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


def _each_or_cheapest(
    offers: Sequence[Mapping[str, Kernel]], time: Callable[[Shaped, str, Kernel], float], uses: Sequence[Shaped]
) -> list[tuple[tuple[str, ...], tuple[Kernel, ...]]]:
    """List the kernels to consider, by name: for one use every one, for several the cheapest of each."""
    if len(offers) == 1:
        return [((name,), (kernel,)) for name, kernel in offers[0].items()]
    if not all(offers):
        return []
    best = [min(o.items(), key=lambda item: time(use, *item)) for o, use in zip(offers, uses, strict=True)]
    return [(tuple(name for name, _ in best), tuple(kernel for _, kernel in best))]


def _between(a: Shaped, b: Shaped, numel: int, device: str) -> float:
    """Estimate the time for the inner products of two kinds' gradients."""
    examples = a.x[0]
    pairs = examples * a.site.positions(a.x, a.g) * b.site.positions(b.x, b.g)
    return nanoseconds("gram", Work(pairs * numel**0.5, moved=4 * pairs), device)
