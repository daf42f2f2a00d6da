"""Say, use by use, how a loss's per-example gradients will be found."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor

from pegrad import trees
from pegrad.call import Call
from pegrad.clipping import Clipping, Grouping, as_clipping, grouping_of
from pegrad.per_example import Loss
from pegrad.plan.candidates import Candidate, Shaped, candidates, stack_name
from pegrad.plan.plan import Plan
from pegrad.problem import Leaves, Problem
from pegrad.rules.site import Site
from pegrad.strategies import Strategy, resolve, resolve_traced
from pegrad.strategies.auto import Auto
from pegrad.strategies.failures import attributed
from pegrad.strategies.fallback import cause, most_paths, try_the_loop
from pegrad.strategies.paths import by_path
from pegrad.strategies.traced import Traced
from pegrad.tables import as_html, as_text
from pegrad.tracing.eager import eager
from pegrad.tracing.taps import Tapped
from pegrad.tracing.trace import Trace
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
    """Why there was no choice, or how many uses of one parameter were chosen for together; otherwise empty."""
    candidates: tuple[Candidate, ...]
    """Every way there was, the cheapest first."""
    group: str = ""
    """The clipping group of its leaves, where there are several groups."""


@dataclass(frozen=True)
class Explanation:
    """A table of all uses of all parameters in one run of a loss; prints well, and renders in a notebook."""

    uses: tuple[Use, ...]
    unused: tuple[str, ...]
    """Paths of the leaves that the loss does not use, whose gradient is zero."""
    paths: tuple[int, ...] = ()
    """How many examples take each of the paths through the loss, if there are several. Each path has its own uses."""
    fallback: str = ""
    """Why `auto` has the loop over the examples run the loss, if it has."""

    def __str__(self) -> str:
        """Return the table as text, at most 120 columns wide; equal uses are one row, and counted."""
        if self.fallback:
            return f"strategy naive, a loop over the examples: {self.fallback}"
        taken = [f"{len(self.paths)} paths, taken by {_enumerate(self.paths)} examples"] if self.paths else []
        return "\n".join([*taken, *as_text(self._table(), 120), *(f"{path}  not used" for path in self.unused)])

    def _repr_html_(self) -> str:
        if self.fallback:
            return as_html([("strategy", "why"), ("naive", self.fallback)])
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
def explain(
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    *,
    clip_norm: float | Clipping | None = None,
    strategy: str | Strategy = "auto",
) -> Explanation:
    """Say how a strategy finds norms and clipped sum, use by use, by running the loss forward and backward once.

    Args:
        loss: as for `pegrad.per_example_grad`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors with one leading axis `B`.
        clip_norm: as for `pegrad.clipped_grad`. Of a clipping by groups, the group of each use is shown; what is made
            of the leaves of two groups is found in another way. None: all leaves are clipped together.
        strategy: `auto`, `book_keeping` or `ghost`, or one of those classes' objects.

    Returns:
        An `Explanation`: for each use its shapes, the kernels chosen, every candidate with its cost, the memory, or
        why there was no choice.

    Raises:
        ArgumentError: the strategy does not choose site by site.
        LeafError, LossError: as `pegrad.per_example_grad`, and as `pegrad.clipped_grad` for `clip_norm`.
    """
    chosen = resolve_traced(strategy)
    problem = Call.of(loss, params, batch, None).problem
    grouping = None if clip_norm is None else grouping_of(as_clipping(clip_norm), params)
    auto = isinstance(resolve(strategy), Auto)
    names = trees.paths(params)

    def explained(part: Problem) -> tuple[list[Use], tuple[str, ...]]:
        _, uses = chosen.run(part, partial(_Uses, chosen=chosen, problem=part, paths=names, grouping=grouping))
        return [*uses.of_sites(), *uses.of_copies()], uses.unused()

    with attributed(chosen, problem):
        try:
            paths = by_path(problem, explained, most_paths(problem.batch_size) if auto else None)
        except Exception as error:
            why = cause(error) if auto else None
            if why is None:
                raise
            try_the_loop(problem)
            return Explanation((), (), fallback=why)
    uses, unused = zip(*(path.answer for path in paths), strict=True)
    taken = tuple(len(path.rows) for path in paths) if len(paths) > 1 else ()
    nowhere = tuple(name for name in unused[0] if all(name in others for others in unused))
    return Explanation(tuple(use for part in uses for use in part), nowhere, taken)


class _Uses:
    """A receiver that computes nothing, and notes which uses come in."""

    def __init__(
        self, trace: Trace, chosen: Traced, problem: Problem, paths: list[str], grouping: Grouping | None
    ) -> None:
        choose = chosen.choose if chosen.keeps else chosen.choose_norm
        self.plan = Plan(trace, choose, problem.sum_rows, grouping and grouping.of)
        self._grouping = grouping
        self._trace = trace
        self._chosen = chosen
        self._problem = problem
        self._paths = paths
        self._entered: set[int] = set()

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Receiver.receive`."""
        self._entered |= {id(site) for site in tapped.sites}

    def receive_copies(self, grads: Leaves) -> None:
        """See `Receiver.receive_copies`."""

    def unused(self) -> tuple[str, ...]:
        """Return the paths of the leaves that the loss does not depend on."""
        sources = [site.source for site, _ in _sites(self._trace) if id(site) in self._entered]
        sources += [copies.source for copies in self._trace.copies]
        used = {leaf for source in sources for leaf in self.plan.uses.leaves(source)}
        return tuple(self._name({leaf}) for leaf in range(len(self._trace.params)) if leaf not in used)

    def of_sites(self) -> list[Use]:
        """Return the uses that the loss depends on, in the order in which the loss made them."""
        return [self._of_site(site, tapped) for site, tapped in _sites(self._trace) if id(site) in self._entered]

    def of_copies(self) -> list[Use]:
        """Return the uses for which each example has a copy."""
        return [
            Use(
                self._name(self.plan.uses.leaves(copies.source)),
                copies.operation or "(in a rule)",
                (),
                tuple(copies.rows.shape),
                "copies",
                "contract" if self._chosen.keeps else "stack",
                copies.rows.numel() if self._chosen.keeps else 0,
                _why_copied(copies.operation),
                (),
                self._group(self.plan.uses.leaves(copies.source)),
            )
            for copies in self._trace.copies
        ]

    def _name(self, leaves: Collection[int]) -> str:
        return ", ".join(f"params{self._paths[leaf]}" for leaf in sorted(leaves))

    def _group(self, leaves: Collection[int]) -> str:
        if self._grouping is None or self._grouping.names is None:
            return ""
        return ", ".join(self._grouping.names[i] for i in sorted({self._grouping.of[leaf] for leaf in leaves}))

    def _of_site(self, site: Site, tapped: Tapped) -> Use:
        group, keeps = self.plan.of[id(site.source)], self._chosen.keeps
        choice, options = group.choice, group.shaped(self._problem.batch_size)
        if choice is None:
            norm, native = stack_name(site, tapped.x, tapped.y, site.source.device.type), group.way == "made"
            why, options = (
                "made of parameters" if native else "shares a leaf",
                [Shaped(site, tapped.x, tapped.y, tapped.dtype)],
            )
        else:
            norm, native = choice.names[group.kind_of(site)], not choice.keeps
            why = f"{len(group.sites)} uses as one" if len(group.sites) > 1 else ""
        kept = prod(tapped.x) + prod(tapped.y) if native else self._problem.batch_size * site.source.numel()
        return Use(
            self._name(self.plan.uses.leaves(site.source)),
            site.operation,
            tapped.x,
            tapped.y,
            norm,
            "native" if native else "contract" if keeps else "stack",
            kept if keeps else 0,
            why,
            tuple(candidates(options, self._chosen.timings)),
            self._group(self.plan.uses.leaves(site.source)),
        )


def _why_copied(operation: str) -> str:
    if operation == "(all)":
        return "out of the trace's sight"
    return f"no rule for {operation}" if operation else "copied by a rule"


_HEADER = ("leaf", "operation", "input", "output", "norm", "sum", "kept", "estimate", "why, or the next best")


def _cells(use: Use) -> tuple[str, ...]:
    shapes = ("×".join(map(str, shape)) for shape in (use.x, use.g))
    chosen = [c for c in use.candidates if use.norm in c.names and c.keeps == (use.sum != "native")]
    others = [c for c in use.candidates if c not in chosen]
    return (
        use.leaves + (f" (group {use.group})" if use.group else ""),
        use.operation,
        *shapes,
        use.norm,
        use.sum,
        _number(use.numbers),
        f"{chosen[0].time / 1e6:.2g} ms" if chosen else "",
        use.why or (f"{others[0].name} {others[0].time / 1e6:.2g} ms" if others else ""),
    )


def _enumerate(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}"


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
