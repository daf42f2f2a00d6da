"""Say, use by use, how a loss's per-example gradients will be found; and measure instead of estimating."""

import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from pegrad import trees
from pegrad.call import Call, check_size
from pegrad.errors import ArgumentError
from pegrad.numerics import accumulator, widen
from pegrad.per_example import Loss
from pegrad.rules.site import Kernel, Site
from pegrad.strategies import BookKeeping, Strategy, resolve
from pegrad.strategies.auto import Auto
from pegrad.strategies.base import Leaves, Problem
from pegrad.strategies.book import Roots, Way
from pegrad.strategies.choice import Candidate, candidates, stack_name, timing_key
from pegrad.strategies.failures import attributed
from pegrad.strategies.traced import Traced
from pegrad.tables import as_html, as_text
from pegrad.tracing.eager import eager
from pegrad.tracing.trace import Tapped, Trace
from pegrad.trees import PyTree


@dataclass(frozen=True)
class Use:
    """One use of a parameter."""

    leaves: str
    """Path of the leaf, or of the leaves that the parameter was made of."""
    operation: str
    x: tuple[int, ...]
    """Shape of the operation's input, physical; empty where each example has a copy of the parameter."""
    g: tuple[int, ...]
    """Shape of the gradient at the operation's output, physical."""
    norm: str
    """The kernel that finds the norms; `copies` where each example has a copy, whose gradient is the stacked one."""
    sum: str
    """How the weighted sum is found: `native`, in one product; `contract`, of stacked gradients that were kept; or
    `stack`, of gradients that are stacked once more in a second backward pass."""
    numbers: int
    """How many numbers are kept for the sum. Uses that share a leaf keep its stacked gradient once, together."""
    why: str
    """Why there was no choice; empty where the cheapest candidate was chosen."""
    candidates: tuple[Candidate, ...]
    """Every way there was, the cheapest first."""


@dataclass(frozen=True)
class Explanation:
    """A table of all uses of all parameters in one run of a loss; prints well, and renders in a notebook."""

    uses: tuple[Use, ...]
    unused: tuple[str, ...]
    """Paths of the leaves that the loss does not use, whose gradient is zero."""

    def __str__(self) -> str:
        """Return the table as text, at most 120 columns wide; equal uses are one row, and counted."""
        return "\n".join([*as_text(self._table(), 120), *(f"{path}  not used" for path in self.unused)])

    def _repr_html_(self) -> str:
        unused = [(path, "not used", *[""] * (len(_HEADER) - 2)) for path in self.unused]
        return as_html([*self._table(), *unused])

    def _table(self) -> list[tuple[str, ...]]:
        rows = Counter(_cells(use) for use in self.uses)
        counted = [
            (leaves, operation + (f" ({count} times)" if count > 1 else ""), *rest)
            for (leaves, operation, *rest), count in rows.items()
        ]
        return [_HEADER, *counted]


@eager
def explain(loss: Loss, params: PyTree, batch: PyTree, *, strategy: str | Strategy = "auto") -> Explanation:
    """Say how a strategy finds norms and clipped sum, use by use, by running the loss forward and backward once.

    Args:
        loss: as for `pegrad.per_example_grad`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors with one leading axis `B`.
        strategy: `auto`, `book_keeping` or `ghost`, or one of those classes' objects.

    Returns:
        An `Explanation`: for each use its shapes, the kernels chosen, every candidate with its cost, the memory, or
        why there was no choice.

    Raises:
        ArgumentError: the strategy does not choose site by site.
        LeafError, LossError: as `pegrad.per_example_grad`.
    """
    chosen = _traced(strategy)
    problem = Call.of(loss, params, batch, None).problem
    with attributed(chosen, problem):
        trace, book = chosen.run(problem, partial(_Uses, chosen=chosen, problem=problem, paths=trees.paths(params)))
    used = {leaf for source in book.sources for leaf in book.roots.lineages[id(source)].leaves}
    unused = tuple(book.name({leaf}) for leaf in range(len(trace.params)) if leaf not in used)
    return Explanation((*book.of_sites(), *book.of_copies()), unused)


class _Uses:
    """A book that enters nothing, and notes what `Norms` would do."""

    def __init__(self, trace: Trace, chosen: Traced, problem: Problem, paths: list[str]) -> None:
        self.roots = Roots.of(trace)
        self.sources: list[Tensor] = [copies.source for copies in trace.copies]
        self._trace = trace
        self._chosen = chosen
        self._problem = problem
        self._paths = paths
        self._found: dict[int, Use] = {}

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Book.receive`."""
        sum_dtype = accumulator(widen(g).dtype, self._problem.sum_rows)
        for site in tapped.sites:
            self.sources.append(site.source)
            self._found[id(site)] = self._use(site, tapped, self.roots.way(site, sum_dtype))

    def receive_copies(self, grads: Leaves) -> None:
        """See `Book.receive_copies`."""

    def of_sites(self) -> list[Use]:
        """Return the uses that the loss depends on, in the order in which the loss made them."""
        return [self._found[id(site)] for site, _ in _sites(self._trace) if id(site) in self._found]

    def of_copies(self) -> list[Use]:
        """Return the uses for which each example has a copy."""
        return [
            Use(
                self.name(self.roots.lineages[id(copies.source)].leaves),
                copies.operation or "(in a rule)",
                (),
                tuple(copies.rows.shape),
                "copies",
                "contract" if self._chosen.keeps else "stack",
                copies.rows.numel() if self._chosen.keeps else 0,
                _why_copied(copies.operation),
                (),
            )
            for copies in self._trace.copies
        ]

    def name(self, leaves: Collection[int]) -> str:
        """Return the leaves' paths."""
        return ", ".join(f"params{self._paths[leaf]}" for leaf in sorted(leaves))

    def _use(self, site: Site, tapped: Tapped, way: Way) -> Use:
        keeps, shapes = self._chosen.keeps, (tapped.x, tapped.y)
        norm, native, why = stack_name(site, *shapes, site.source.device.type), way == "made", ""
        if way == "alone":
            choice = (self._chosen.choose if keeps else self._chosen.choose_norm)(site, tapped)
            norm, native = choice.norm, not choice.keeps
        elif self.roots.sole(site.source):
            why = "made of parameters"
        else:
            why = "shares a leaf"
        kept = prod(tapped.x) + prod(tapped.y) if native else self._problem.batch_size * site.source.numel()
        return Use(
            self.name(self.roots.lineages[id(site.source)].leaves),
            site.operation,
            *shapes,
            norm,
            "native" if native else "contract" if keeps else "stack",
            kept if keeps else 0,
            why,
            tuple(candidates(site, *shapes, self._chosen.timings)),
        )


def _why_copied(operation: str) -> str:
    if operation == "(all)":
        return "out of the trace's sight"
    return f"no rule for {operation}" if operation else "copied by a rule"


@eager
def autotune(
    loss: Loss, params: PyTree, batch: PyTree, *, strategy: str | Strategy = "auto", repeats: int = 3
) -> Strategy:
    """Measure every kernel at every site of a loss, and return a strategy that chooses by what was measured.

    Args:
        loss: as for `pegrad.per_example_grad`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors with one leading axis `B`: of the size that will be used, for shapes that were not
            measured are estimated. Kernels run on random numbers of the same shapes.
        strategy: `auto`, `book_keeping` or `ghost`, or one of those classes' objects.
        repeats: runs of each kernel, >= 1, of which the fastest counts.

    Returns:
        A strategy to be passed on as `strategy=`.

    Raises:
        ArgumentError: the strategy does not choose site by site, or `repeats` is below 1.
        LeafError, LossError: as `pegrad.per_example_grad`.
    """
    chosen = _traced(strategy)
    check_size("repeats", repeats)
    problem = Call.of(loss, params, batch, None).problem
    with attributed(chosen, problem):
        trace = chosen.trace(problem)
    timings: dict[str, float] = {}
    for site, tapped in _sites(trace):
        native = site.summing(tapped.x, tapped.y)
        kernels = {**site.stacking(tapped.x, tapped.y), **site.norming(tapped.x, tapped.y)}
        if (len(kernels) == 1 and not native) or not tapped.dtype.is_floating_point:
            continue
        kernels |= {"native": native} if native else {}
        keys = {timing_key(site, tapped.x, tapped.y, name): kernel for name, kernel in kernels.items()}
        x = torch.randn(tapped.x, device=site.source.device, dtype=site.source.dtype)
        g = torch.randn(tapped.y, device=site.source.device, dtype=site.source.dtype)
        for key, kernel in keys.items():
            if key not in timings:
                timings[key] = min(_clock(kernel, x, g) for _ in range(repeats))
    return replace(chosen, timings=timings)


_HEADER = ("leaf", "operation", "input", "output", "norm", "sum", "kept", "estimate", "why, or the next best")


def _cells(use: Use) -> tuple[str, ...]:
    shapes = ("×".join(map(str, shape)) for shape in (use.x, use.g))
    chosen = [c for c in use.candidates if c.norm == use.norm and c.keeps == (use.sum != "native")]
    others = [c for c in use.candidates if c not in chosen]
    return (
        use.leaves,
        use.operation,
        *shapes,
        use.norm,
        use.sum,
        _number(use.numbers),
        f"{chosen[0].time / 1e6:.2g} ms" if chosen else "",
        use.why or (f"{others[0].name} {others[0].time / 1e6:.2g} ms" if others else ""),
    )


def _number(count: int) -> str:
    """Write a number in three digits: 64, 1.5 k, 12 M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _sites(trace: Trace) -> Iterator[tuple[Site, Tapped]]:
    for tapped in trace.tapped:
        for site in tapped.sites:
            yield site, tapped


def _traced(strategy: str | Strategy) -> Traced:
    chosen = resolve(strategy)
    if isinstance(chosen, Auto):
        return BookKeeping()
    if not isinstance(chosen, Traced):
        raise ArgumentError(
            f"Expected a strategy that chooses site by site (auto, book_keeping, ghost), got {strategy!r}"
        )
    return chosen


def _clock(kernel: Kernel, x: Tensor, g: Tensor) -> float:
    """Time one run of a kernel, in nanoseconds."""
    start = time.perf_counter()
    kernel.run(x, g)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) * 1e9
