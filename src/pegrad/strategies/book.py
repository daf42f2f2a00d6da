"""What a backward pass over a trace is turned into: stacked gradients, norms, and weighted sums."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.rules.site import Site
from pegrad.strategies.base import Leaves, accumulator, contract, squared_norms
from pegrad.strategies.choice import Candidate, stack_kernel
from pegrad.tracing.lineage import Lineage, lineage
from pegrad.tracing.trace import Tapped, Trace

Choose = Callable[[Site, Tapped], Candidate]
Weigh = Callable[[Tensor], Tensor]
Sum = Callable[[Tensor, Tensor | None], Tensor]
"""`(weights, bad rows or None) -> weighted sum`, in the shape of a source."""


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

    def alone(self, source: Tensor) -> bool:
        """Tell whether the norm of this use's gradient is that of its leaf's: its only use, and an isometry."""
        line = self.lineages[id(source)]
        return line.isometric and all(self.uses[leaf] == 1 for leaf in line.leaves)


class Book:
    """Turns what a backward pass shows of each site into norms, and keeps what the weighted sum will need.

    Uses of a parameter that stand alone find their norms by the kernel chosen for them. Uses that share a leaf, or
    reach theirs by more than an isometry, interfere: their gradients are stacked, brought to the leaf and added.

    Args:
        trace: the trace that will be run backward.
        choose: how each site's norms are found; None: all uses are stacked.
        keep: whether `weighted_sum` will be asked for.
    """

    def __init__(self, trace: Trace, choose: Choose | None, *, keep: bool) -> None:
        self._trace = trace
        self._roots = Roots.of(trace)
        self._choose = choose
        self._keep = keep
        self._squares: list[Tensor] = []
        self._sums: list[tuple[Tensor, Sum]] = []
        self._shared: dict[int, Tensor] = {}

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """Enter one tapped operation: its input and the gradient at its output."""
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            if self._choose and self._roots.alone(site.source):
                self._enter(site, self._choose(site, tapped), x, g)
            else:
                self._share(site.source, stack_kernel(site, x, g).run(x, g))

    def receive_copies(self, grads: Leaves) -> None:
        """Enter the stacked gradients of the parameters of which each example had a copy."""
        for copies, grad in zip(self._trace.copies, grads, strict=True):
            if self._choose and self._roots.alone(copies.source):
                self._enter_stacked(copies.source, grad)
            else:
                self._share(copies.source, grad)

    def squared_norms(self) -> Tensor:
        """Return the squared norms over all leaves, `(B,)`, once all is entered."""
        batch = self._trace.losses.shape[0]
        zero = torch.zeros(batch, device=self._trace.losses.device, dtype=accumulator(self._trace.losses.dtype))
        shared = [squared_norms([stacked]) for stacked in self._shared.values()]
        return sum([*self._squares, *shared], start=zero)

    def stacked(self, leaf: int) -> Tensor:
        """Return the stacked gradient of a leaf, if all uses were stacked."""
        param = self._trace.params[leaf].detach()
        if leaf in self._shared:
            return self._shared[leaf].to(param.dtype)
        return param.new_zeros(self._trace.losses.shape[0], *param.shape)

    def weighted_sum(self, weights: Tensor, bad: Tensor | None) -> Leaves:
        """Return the weighted sum for each leaf.

        Args:
            weights: `(B,)`.
            bad: `(B,)`, boolean: rows that may not be finite, whose weight is zero; None: no such row.
        """
        leaves = gather(self._trace, [(source, total(weights, bad)) for source, total in self._sums])
        for leaf, stacked in self._shared.items():
            leaves[leaf] += contract(weights, stacked)
        return leaves

    def _enter(self, site: Site, choice: Candidate, x: Tensor, g: Tensor) -> None:
        shapes = tuple(x.shape), tuple(g.shape)
        if choice.stacks:
            stacked = site.stacking(*shapes)[choice.norm].run(x, g)
            if choice.keeps or not self._keep:
                return self._enter_stacked(site.source, stacked)
            self._squares.append(squared_norms([stacked]))
        else:
            self._squares.append(site.norming(*shapes)[choice.norm].run(x, g))
        if self._keep:
            self._sums.append((site.source, lambda weights, bad: native_sum(site, *_weigh(x, g, weights, bad))))
        return None

    def _enter_stacked(self, source: Tensor, stacked: Tensor) -> None:
        self._squares.append(squared_norms([stacked]))
        if self._keep:
            self._sums.append((source, lambda weights, bad: contract(weights, stacked)))

    def _share(self, source: Tensor, stacked: Tensor) -> None:
        for leaf, grad in pull_rows(self._trace, source, stacked).items():
            self._shared[leaf] = self._shared[leaf] + grad if leaf in self._shared else grad


def native_sum(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """Sum a site's gradient over the batch, natively where that exists."""
    native = site.summing(tuple(x.shape), tuple(g.shape))
    return native.run(x, g) if native else stack_kernel(site, x, g).run(x, g).sum(0)


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


_PIECES = 3  # of 8 bits each make float32's 24


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


def _weigh(x: Tensor, g: Tensor, weights: Tensor, bad: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = weights.to(g.dtype).repeat_interleave(g.shape[0] // weights.shape[0])
    return wipe(x, bad), wipe(g, bad) * rows.reshape(-1, *[1] * (g.dim() - 1))
