"""Say, use by use, how a loss's per-example gradients will be found; and measure instead of estimating."""

import html
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pegrad import trees
from pegrad.call import Call, check_size
from pegrad.errors import ArgumentError
from pegrad.per_example import Loss
from pegrad.rules.site import Kernel, Site
from pegrad.strategies import BookKeeping, Strategy, resolve
from pegrad.strategies.auto import Auto
from pegrad.strategies.book import Roots
from pegrad.strategies.choice import Candidate, candidates, timing_key
from pegrad.strategies.failures import attributed
from pegrad.strategies.traced import Traced
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
    """The kernel that finds the norms."""
    sum: str
    """How the weighted sum is found."""
    numbers: int
    """How many numbers are kept for it."""
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
        """Return the table as text."""
        table = [_HEADER, *(_cells(use) for use in self.uses)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *(f"{path}  not used" for path in self.unused)])

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        unused = "".join(row((path, "not used", *[""] * (len(_HEADER) - 2)), "td") for path in self.unused)
        return f"<table>{row(_HEADER, 'th')}{''.join(row(_cells(use), 'td') for use in self.uses)}{unused}</table>"


@eager
def explain(loss: Loss, params: PyTree, batch: PyTree, *, strategy: str | Strategy = "auto") -> Explanation:
    """Run a loss once, forward only, and say how a strategy will find norms and clipped sum, use by use.

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
        trace = chosen.trace(problem)
    roots = Roots.of(trace)
    paths = trees.paths(params)

    def name(leaves: frozenset[int]) -> str:
        return ", ".join(f"params{paths[leaf]}" for leaf in sorted(leaves))

    uses = []
    for site, tapped in _sites(trace):
        line = roots.lineages[id(site.source)]
        options = tuple(candidates(site, tapped.x, tapped.y, chosen.timings))
        if roots.alone(site.source):
            best, why = chosen.choose(site, tapped), ""
        else:
            best = min((c for c in options if c.stacks), key=lambda c: (c.norm_time, not c.keeps))
            why = "shares a leaf with other uses" if line.isometric else "made of parameters, not one itself"
        how = "contract" if best.keeps else "native"
        uses.append(
            Use(name(line.leaves), site.operation, tapped.x, tapped.y, best.norm, how, best.numbers, why, options)
        )
    for copies in trace.copies:
        leaves = roots.lineages[id(copies.source)].leaves
        why = f"no rule for {copies.operation}"
        size = copies.rows.numel()
        uses.append(
            Use(name(leaves), copies.operation, (), tuple(copies.rows.shape), "copies", "contract", size, why, ())
        )
    unused = tuple(f"params{paths[leaf]}" for leaf, count in enumerate(roots.uses) if count == 0)
    return Explanation(tuple(uses), unused)


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


_HEADER = ("leaf", "operation", "input", "output", "norm", "sum", "kept", "estimate", "why, or the other ways")


def _cells(use: Use) -> tuple[str, ...]:
    shapes = ("×".join(map(str, shape)) for shape in (use.x, use.g))
    chosen = [c for c in use.candidates if c.norm == use.norm and c.keeps == (use.sum == "contract")]
    others = "; ".join(f"{c.name} {c.time / 1e6:.2g} ms" for c in use.candidates if c not in chosen)
    return (
        use.leaves,
        use.operation,
        *shapes,
        use.norm,
        use.sum,
        f"{use.numbers / 1e6:.2g} M",
        f"{chosen[0].time / 1e6:.2g} ms" if chosen else "",
        use.why or others,
    )


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
