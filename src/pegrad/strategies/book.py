"""What a backward pass over a trace is turned into: stacked gradients, norms, and weighted sums."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pegrad.rules.gram import BLOCK
from pegrad.rules.site import Kernel, Site
from pegrad.strategies.base import Leaves, accumulator, contract, squared_norms
from pegrad.strategies.choice import Candidate, stack_kernel
from pegrad.tracing.lineage import Lineage, lineage
from pegrad.tracing.trace import Tapped, Trace

Choose = Callable[[Site, Tapped], Candidate]
Visit = Callable[[int, Tensor], None]
"""`(leaf, its stacked gradient (B, *leaf.shape))`"""
Sum = Callable[[Tensor, Tensor | None], Tensor]
"""`(weights, bad rows or None) -> weighted sum`, in the shape of a source."""


class Book(Protocol):
    """What receives a backward pass."""

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """Enter one tapped operation: its input and the gradient at its output."""

    def receive_copies(self, grads: Leaves) -> None:
        """Enter, last of all, the stacked gradients of the parameters of which each example had a copy."""


class Roots(NamedTuple):
    """How the uses of the parameters in one trace hang together."""

    lineages: dict[int, Lineage]
    """Where each source comes from, by `id`."""
    uses: list[int]
    """Number of uses of each leaf."""

    @classmethod
    def of(cls, trace: Trace) -> "Roots":
        """Follow every use in a trace back to the leaves."""
        leaves = {id(leaf): i for i, leaf in enumerate(trace.params)}
        sources = [site.source for tapped in trace.tapped for site in tapped.sites]
        sources += [copies.source for copies in trace.copies]
        lineages = {id(source): lineage(source, leaves) for source in sources}
        uses = [0] * len(leaves)
        for source in sources:
            for leaf in lineages[id(source)].leaves:
                uses[leaf] += 1
        return cls(lineages, uses)

    def sole(self, source: Tensor) -> bool:
        """Tell whether this is the only use of all the leaves that it comes from."""
        return all(self.uses[leaf] == 1 for leaf in self.lineages[id(source)].leaves)

    def alone(self, source: Tensor) -> bool:
        """Tell whether the norm of this use's gradient is that of its leaf's: its only use, and an isometry."""
        return self.lineages[id(source)].isometric and self.sole(source)


class Leafwise:
    """Adds up, leaf by leaf, the stacked gradients of all uses."""

    def __init__(self, trace: Trace, roots: Roots) -> None:
        self._trace = trace
        self._roots = roots
        self._awaited = list(roots.uses)
        self._partial: dict[int, Tensor] = {}

    def add(self, source: Tensor, stacked: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Add one use's stacked gradient; yield the leaves whose last use this was, with theirs."""
        for leaf, rows in pull_rows(self._trace, source, stacked).items():
            self._partial[leaf] = self._partial[leaf] + rows if leaf in self._partial else rows
        for leaf in self._roots.lineages[id(source)].leaves:
            self._awaited[leaf] -= 1
            if self._awaited[leaf] == 0 and leaf in self._partial:
                yield leaf, self._partial.pop(leaf)

    def rest(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the leaves some of whose uses the loss does not depend on after all."""
        while self._partial:
            yield self._partial.popitem()


class Stacks:
    """Stacked gradients, leaf by leaf: each is shown once all its uses have come in, and then forgotten.

    Args:
        trace: the trace that will be run backward.
        visit: called once for each leaf that the loss depends on.
    """

    def __init__(self, trace: Trace, visit: Visit) -> None:
        self._trace = trace
        self._visit = visit
        self._leaves = Leafwise(trace, Roots.of(trace))

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Book.receive`."""
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            self._show(self._leaves.add(site.source, stack_rows(site, x, g)))

    def receive_copies(self, grads: Leaves) -> None:
        """See `Book.receive_copies`."""
        for copies, grad in zip(self._trace.copies, grads, strict=True):
            self._show(self._leaves.add(copies.source, grad))
        self._show(self._leaves.rest())

    def _show(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self._visit(leaf, rows)


class Norms:
    """Squared norms over all leaves, and on request what the weighted sum will need.

    Uses of a parameter that stand alone find their norms by the kernel chosen for them. Uses that share a leaf, or
    reach theirs by more than an isometry, interfere: their gradients are stacked and added before the norm is taken.

    Args:
        trace: the trace that will be run backward.
        choose: how each site's norms are found.
        keep: whether `weighted_sum` will be asked for.
    """

    def __init__(self, trace: Trace, choose: Choose, *, keep: bool) -> None:
        self._trace = trace
        self._batch = trace.losses.shape[0]
        self._roots = Roots.of(trace)
        self._shared = Leafwise(trace, self._roots)
        self._choose = choose
        self._keep = keep
        self._squares: list[Tensor] = []
        self._sums: list[tuple[Tensor, Sum]] = []

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Book.receive`."""
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            if self._roots.alone(site.source):
                self._enter(site, self._choose(site, tapped), x, g)
            elif self._roots.sole(site.source) and site.summing(tapped.x, tapped.y):
                self._enter_made(site, x, g)
            else:
                self._enter_leaves(self._shared.add(site.source, stack_rows(site, x, g)))

    def receive_copies(self, grads: Leaves) -> None:
        """See `Book.receive_copies`."""
        for copies, grad in zip(self._trace.copies, grads, strict=True):
            if self._roots.alone(copies.source):
                self._enter_stacked(copies.source, grad)
            else:
                self._enter_leaves(self._shared.add(copies.source, grad))
        self._enter_leaves(self._shared.rest())

    def squared_norms(self) -> Tensor:
        """Return the squared norms, `(B,)`, in at least float32, once all is entered."""
        losses = self._trace.losses
        return sum(self._squares, start=torch.zeros_like(losses, dtype=accumulator(losses.dtype)).detach())

    def weighted_sum(self, weights: Tensor, bad: Tensor | None) -> Leaves:
        """Return the weighted sum for each leaf; what was kept for it is let go, use by use.

        Args:
            weights: `(B,)`.
            bad: `(B,)`, boolean: rows that may not be finite, whose weight is zero; None: no such row.
        """
        totals = []
        while self._sums:
            source, total = self._sums.pop()
            totals.append((source, total(weights, bad)))
        return gather(self._trace, totals)

    def _enter(self, site: Site, choice: Candidate, x: Tensor, g: Tensor) -> None:
        shapes = tuple(x.shape), tuple(g.shape)
        if not choice.stacks:
            self._squares.append(site.norming(*shapes)[choice.norm].run(x, g))
        elif choice.keeps and self._keep:
            return self._enter_stacked(site.source, site.stacking(*shapes)[choice.norm].run(x, g))
        else:
            stacks = _stack_by_parts(site.stacking(*shapes)[choice.norm], site, x, g, self._batch)
            self._squares.append(torch.cat([squared_norms([rows]) for rows in stacks]))
        self._sum_natively(site, x, g)
        return None

    def _enter_made(self, site: Site, x: Tensor, g: Tensor) -> None:
        """Enter the only use of leaves that the source was made of by more than an isometry."""
        stacks = _stack_by_parts(stack_kernel(site, x, g), site, x, g, self._batch)
        pulled = (pull_rows(self._trace, site.source, rows) for rows in stacks)
        self._squares.append(torch.cat([squared_norms(list(leaves.values())) for leaves in pulled]))
        self._sum_natively(site, x, g)

    def _sum_natively(self, site: Site, x: Tensor, g: Tensor) -> None:
        def total(weights: Tensor, bad: Tensor | None) -> Tensor:
            return native_sum(site, *site.weigh(wipe(x, bad), wipe(g, bad), weights))

        if self._keep:
            self._sums.append((site.source, total))

    def _enter_leaves(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self._enter_stacked(self._trace.params[leaf], rows)

    def _enter_stacked(self, source: Tensor, stacked: Tensor) -> None:
        self._squares.append(squared_norms([stacked]))
        if self._keep:
            self._sums.append((source, lambda weights, bad: contract(weights, stacked, bad)))


def _stack_by_parts(kernel: Kernel, site: Site, x: Tensor, g: Tensor, batch: int) -> Iterator[Tensor]:
    """Stack a site's gradients a few examples at a time: they, and what the kernel moves, stay in the cache."""
    numbers = site.source.numel() + (x.numel() + g.numel() + int(kernel.work.moved)) // batch
    step = max(1, BLOCK // numbers) * (x.shape[0] // batch)
    for start in range(0, x.shape[0], step):
        yield kernel.run(x[start : start + step], g[start : start + step])


def stack_rows(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """Stack a site's gradients by the kernel that is estimated to be the cheapest: `(B, *source.shape)`."""
    return stack_kernel(site, x, g).run(x, g)


def native_sum(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """Sum a site's gradient over the batch, natively where that exists."""
    native = site.summing(tuple(x.shape), tuple(g.shape))
    return native.run(x, g) if native else stack_rows(site, x, g).sum(0)


_PIECES = 3  # of 8 bits each make float32's 24


def gather(trace: Trace, totals: list[tuple[Tensor, Tensor]]) -> Leaves:
    """Bring gradients at sources back to the leaves and add them up, in at least float32."""
    index = {id(leaf): i for i, leaf in enumerate(trace.params)}
    sums: dict[int, Tensor] = {}

    def add(leaf: int, total: Tensor) -> None:
        sums[leaf] = sums[leaf] + total if leaf in sums else total.to(accumulator(total.dtype))

    for source, total in totals:
        if id(source) in index:
            add(index[id(source)], total)
    made = [(source, total) for source, total in totals if id(source) not in index]
    narrow = any(source.dtype != total.dtype for source, total in made)
    for _ in range(_PIECES if narrow else bool(made)):
        # A source of half precision passes on no more digits than it has itself: the rest is sent after.
        pieces = [total.to(source.dtype) for source, total in made]
        origins = [source for source, _ in made]
        grads = torch.autograd.grad(origins, trace.params, pieces, retain_graph=True, allow_unused=True)
        for leaf, grad in enumerate(grads):
            if grad is not None:
                add(leaf, grad)
        made = [(source, total - piece) for (source, total), piece in zip(made, pieces, strict=True)]
    return [
        sums[i] if i in sums else torch.zeros_like(leaf, dtype=accumulator(leaf.dtype), requires_grad=False)
        for i, leaf in enumerate(trace.params)
    ]


def pull_rows(trace: Trace, source: Tensor, stacked: Tensor) -> dict[int, Tensor]:
    """Bring stacked gradients `(B, *source.shape)` back to the leaves, row by row."""
    for i, leaf in enumerate(trace.params):
        if source is leaf:
            return {i: stacked}
    grads = torch.autograd.grad(
        source,
        trace.params,
        stacked.to(source.dtype),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    return {i: widen(grad) for i, grad in enumerate(grads) if grad is not None}


def widen(t: Tensor) -> Tensor:
    """Turn half precision to float32; integers and wider numbers stay as they are."""
    return t.to(accumulator(t.dtype)) if t.is_floating_point() else t


def wipe(t: Tensor, bad: Tensor | None) -> Tensor:
    """Set the bad examples' rows to zero, of a tensor with one or several rows an example."""
    if bad is None or not t.is_floating_point():
        return t
    rows = bad.repeat_interleave(t.shape[0] // bad.shape[0])
    return t.masked_fill(rows.reshape(-1, *[1] * (t.dim() - 1)), 0)
