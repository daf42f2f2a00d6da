"""What a backward pass over a trace is turned into: stacked gradients, norms, and weighted sums."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.numerics import accumulator, contract, squared_norms, widen
from pegrad.rules.site import Site
from pegrad.strategies import rounding
from pegrad.strategies.base import Leaves
from pegrad.strategies.choice import Candidate, stack_kernel
from pegrad.strategies.native import Magnitudes, NativeSum, guarded_norms, stacked_parts
from pegrad.tracing.lineage import Lineage, lineage
from pegrad.tracing.trace import Tapped, Trace

Choose = Callable[[Site, Tapped], Candidate]
Visit = Callable[[int, Tensor], None]
"""`(leaf, its stacked gradient (B, *leaf.shape))`"""
Totals = Iterable[tuple[Tensor, Tensor]]
"""Tensors, each with what is to be added to the gradient there."""
Sum = Callable[[Tensor, Tensor | None], Totals]
"""`(weights, bad rows or None) -> Totals`"""

Way = Literal["alone", "made", "shared"]
"""By the kernel chosen; stacked, with a native sum; or stacked and added to the leaf's other uses."""


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

    def exactly_made(self, source: Tensor, sum_dtype: torch.dtype) -> bool:
        """Tell whether a sum at this use reaches the leaves with all its digits, though by more than an isometry."""
        line = self.lineages[id(source)]
        return self.sole(source) and not line.cast and source.dtype == sum_dtype

    def way(self, site: Site, sum_dtype: torch.dtype) -> Way:
        """Decide how a site's norms and sum are found: what `Norms` does, and `explain` prints."""
        if self.alone(site.source):
            return "alone"
        return "made" if site.bounded and self.exactly_made(site.source, sum_dtype) else "shared"


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
    """Squared norms over all leaves, and what the weighted sum will need.

    Uses of a parameter that stand alone find their norms by the kernel chosen for them. Uses that share a leaf
    interfere: their gradients are stacked and added before the norm is taken.

    A stacked gradient is safe as it is: what is weighed is what was measured. Where the sum is a product of its own,
    or the norm a difference of large numbers, `NativeSum` and `guarded_norms` see to it that both are of one gradient.

    Args:
        trace: the trace that will be run backward.
        choose: how each site's norms are found.
        floor: the norm below which nothing depends on it.
        rows: how many rows will be summed in all: see `Problem.rows`.
        keep: whether what `weighted_sum` needs is kept, so that no second backward pass is needed.
    """

    def __init__(self, trace: Trace, choose: Choose, *, floor: float = 0.0, rows: int = 1, keep: bool = False) -> None:
        self.trace = trace
        self.roots = Roots.of(trace)
        self.rows = rows
        self.batch = trace.losses.shape[0]
        self.native: dict[int, NativeSum] = {}
        """For each site whose sum will be native, by `id`, how."""
        self._shared = Leafwise(trace, self.roots)
        self._choose = choose
        self._floor = floor
        self._keep = keep
        self._squares: list[Tensor] = []
        self._sums: list[Callable[[Tensor, Tensor | None, Weighting], Totals]] = []

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Book.receive`."""
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            way = self.roots.way(site, accumulator(g.dtype, self.rows))
            if way == "alone":
                self._enter(site, self._choose(site, tapped), x, g)
            elif way == "made":
                self._enter_made(site, x, g)
            else:
                self._enter_leaves(self._shared.add(site.source, stack_rows(site, x, g)))

    def receive_copies(self, grads: Leaves) -> None:
        """See `Book.receive_copies`."""
        for copies, grad in zip(self.trace.copies, grads, strict=True):
            if self.roots.alone(copies.source):
                self._enter_stacked(copies.source, grad)
            else:
                self._enter_leaves(self._shared.add(copies.source, grad))
        self._enter_leaves(self._shared.rest())

    def squared_norms(self) -> Tensor:
        """Return the squared norms, `(B,)`, in float64, once all is entered."""
        start = torch.zeros(self.batch, dtype=torch.float64, device=self.trace.losses.device)
        return sum(self._squares, start=start)

    def weighted_sum(self, weights: Tensor, bad: Tensor | None, weighting: Weighting) -> Leaves:
        """Return the weighted sum for each leaf; what was kept for it is let go, use by use.

        Args:
            weights: `(B,)`.
            bad: `(B,)`, boolean: rows that may not be finite, whose weight is zero; None: no such row.
            weighting: where the weights come from.
        """
        totals: list[tuple[Tensor, Tensor]] = []
        while self._sums:
            totals += self._sums.pop()(weights, bad, weighting)
        return gather(self.trace, self.roots, totals, self.rows)

    def _enter(self, site: Site, choice: Candidate, x: Tensor, g: Tensor) -> None:
        shapes = tuple(x.shape), tuple(g.shape)
        if choice.keeps:  # the sum is one of stacked gradients
            kernel = site.stacking(*shapes)[choice.norm]
            if self._keep:
                self._enter_stacked(site.source, kernel.run(x, g))
            else:
                parts = stacked_parts(kernel, site, x, g, self.batch)
                self._squares.append(torch.cat([squared_norms(rows) for rows in parts]))
            return
        kernel = (site.stacking if choice.stacks else site.norming)(*shapes)[choice.norm]
        squares, shares = guarded_norms(kernel, choice.stacks, Magnitudes(site, x, g), self.batch, self._floor)
        self._squares.append(squares)
        self._sum_natively(NativeSum(site, shares), x, g)

    def _enter_made(self, site: Site, x: Tensor, g: Tensor) -> None:
        """Enter the only use of leaves that the source was made of by more than an isometry.

        What is made of the leaves may leave a part of a gradient out, and a row may consist of little else: rows whose
        gradient at the source is long beside that at the leaves are kept at the leaves, and out of the sum.
        """
        kernel = stack_kernel(site, x, g)
        at_source, at_leaves = [], []
        for rows in stacked_parts(kernel, site, x, g, self.batch):
            at_source.append(squared_norms(rows))
            at_leaves.append(_squares_of(pull_rows(self.trace, site.source, rows)))
        squares, sources = torch.cat(at_leaves), torch.cat(at_source)
        gains = squares / sources
        typical, noise = self._way_to_leaves(site.source)
        gain = float(torch.cat([gains[torch.isfinite(gains)], typical]).max().sqrt())
        errors = Magnitudes(site, x, g).share_errors() * gain + noise * sources.sqrt()
        positions = site.positions(tuple(x.shape), tuple(g.shape))
        norms = squares.sqrt().clamp(min=self._floor)
        apart = rounding.mistrusted_shares(norms.reciprocal(), errors, 1.0, positions) if self._floor else errors < 0
        native = NativeSum(site, errors, gain, apart)
        several = x.shape[0] // self.batch
        for row in apart.nonzero().squeeze(1).tolist():
            part = slice(row * several, (row + 1) * several)
            pulled = pull_rows(self.trace, site.source, kernel.run(x[part], g[part]))
            squares[row] = _squares_of(pulled)[0]
            native.made.extend(
                (self.trace.params[leaf], apart.new_tensor([row], dtype=torch.int64), rows)
                for leaf, rows in pulled.items()
            )
        self._squares.append(squares)
        self._sum_natively(native, x, g)

    def _way_to_leaves(self, source: Tensor) -> tuple[Tensor, float]:
        """Try how gradients come from a source to the leaves.

        Returns:
            How much longer random ones of norm one become, squared, `(b,)`; and how long what rounding makes of them on
            the way may be, known by that they do not add up. Where nearly all of a gradient cancels, that is all there
            is of it at the leaves.
        """
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(_PROBES, *source.shape, generator=generator).to(source)
        probes = probes / probes.flatten(1).norm(dim=1).reshape(-1, *[1] * source.dim())
        pulled = pull_rows(self.trace, source, torch.cat([probes, probes.sum(0, keepdim=True)]))
        apart = {leaf: rows[:-1].sum(0, keepdim=True) - rows[-1:] for leaf, rows in pulled.items()}
        noise = _NOISE * float(_squares_of(apart).sqrt())
        return _squares_of({leaf: rows[:-1] for leaf, rows in pulled.items()}), noise

    def _sum_natively(self, native: NativeSum, x: Tensor, g: Tensor) -> None:
        self.native[id(native.site)] = native
        if self._keep:
            dtype = accumulator(g.dtype, self.rows)
            self._sums.append(lambda weights, bad, weighting: native.totals(x, g, weights, bad, weighting, dtype))

    def _enter_leaves(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self._enter_stacked(self.trace.params[leaf], rows)

    def _enter_stacked(self, source: Tensor, stacked: Tensor) -> None:
        self._squares.append(squared_norms(stacked))
        if self._keep:
            dtype = accumulator(stacked.dtype, self.rows)
            self._sums.append(lambda weights, bad, weighting: [(source, contract(weights, stacked, bad, dtype))])


_PROBES = 4
_NOISE = 8.0  # what the probes show of it, and a margin


class Sums:
    """The weighted sum, found in a second backward pass like the one in which the norms were.

    Args:
        norms: the book of the first pass.
        weights: `(B,)`.
        bad: `(B,)`, boolean: rows that may not be finite, whose weight is zero; None: no such row.
        weighting: where the weights come from.
    """

    def __init__(self, norms: Norms, weights: Tensor, bad: Tensor | None, weighting: Weighting) -> None:
        self._norms = norms
        self._weights = weights
        self._bad = bad
        self._weighting = weighting
        self._shared = Leafwise(norms.trace, norms.roots)
        self._totals: list[tuple[Tensor, Tensor]] = []

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Book.receive`."""
        x, g = widen(x), widen(g)
        dtype = accumulator(g.dtype, self._norms.rows)
        for site in tapped.sites:
            native = self._norms.native.get(id(site))
            if native:
                self._totals += native.totals(x, g, self._weights, self._bad, self._weighting, dtype)
            elif self._norms.roots.alone(site.source):
                self._add_parts(site, x, g)
            else:
                self._add_leaves(self._shared.add(site.source, stack_rows(site, x, g)))

    def receive_copies(self, grads: Leaves) -> None:
        """See `Book.receive_copies`."""
        for copies, grad in zip(self._norms.trace.copies, grads, strict=True):
            if self._norms.roots.alone(copies.source):
                self._add(copies.source, grad)
            else:
                self._add_leaves(self._shared.add(copies.source, grad))
        self._add_leaves(self._shared.rest())

    def total(self) -> Leaves:
        """Return the weighted sum for each leaf, once all is entered."""
        return gather(self._norms.trace, self._norms.roots, self._totals, self._norms.rows)

    def _add_parts(self, site: Site, x: Tensor, g: Tensor) -> None:
        start = 0
        for rows in stacked_parts(stack_kernel(site, x, g), site, x, g, self._norms.batch):
            self._add(site.source, rows, start)
            start += len(rows)

    def _add_leaves(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self._add(self._norms.trace.params[leaf], rows)

    def _add(self, source: Tensor, rows: Tensor, start: int = 0) -> None:
        part = slice(start, start + len(rows))
        bad = None if self._bad is None else self._bad[part]
        dtype = accumulator(rows.dtype, self._norms.rows)
        self._totals.append((source, contract(self._weights[part], rows, bad, dtype)))


def stack_rows(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """Stack a site's gradients by the kernel that is estimated to be the cheapest: `(B, *source.shape)`."""
    return stack_kernel(site, x, g).run(x, g)


def gather(trace: Trace, roots: Roots, totals: Totals, rows: int) -> Leaves:
    """Bring gradients at sources back to the leaves and add them up, in the dtype of a sum of so many rows."""
    index = {id(leaf): i for i, leaf in enumerate(trace.params)}
    sums: dict[int, Tensor] = {}
    for source, total in totals:
        found = {index[id(source)]: total} if id(source) in index else _pull_total(trace, roots, source, total)
        for leaf, part in found.items():
            sums[leaf] = sums[leaf] + part if leaf in sums else part
    return [
        sums[i] if i in sums else torch.zeros_like(leaf, dtype=accumulator(leaf.dtype, rows), requires_grad=False)
        for i, leaf in enumerate(trace.params)
    ]


def _pull_total(trace: Trace, roots: Roots, source: Tensor, total: Tensor) -> dict[int, Tensor]:
    """Bring one sum back to the leaves with all its digits, though autograd passes on no more than a dtype's."""
    digits = 8 if roots.lineages[id(source)].cast else min(_DIGITS[source.dtype], _DIGITS[total.dtype])
    narrow = torch.bfloat16 if digits == 8 else source.dtype
    sums: dict[int, Tensor] = {}
    for _ in range(-(-_DIGITS[total.dtype] // digits)):
        # A power of two keeps the piece within the range of float16, should it pass through that.
        scale = 2.0 ** int(torch.frexp(total.abs().max()).exponent) if total.numel() and digits == 8 else 1.0
        piece = (total / scale).to(narrow)
        for leaf, part in _pull(trace, source, piece.to(source.dtype), batched=False).items():
            part = part.to(total.dtype) * scale
            sums[leaf] = sums[leaf] + part if leaf in sums else part
        total = total - piece.to(total.dtype) * scale
    return sums


_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def pull_rows(trace: Trace, source: Tensor, stacked: Tensor) -> dict[int, Tensor]:
    """Bring stacked gradients `(B, *source.shape)` back to the leaves, row by row."""
    for i, leaf in enumerate(trace.params):
        if source is leaf:
            return {i: stacked}
    pulled = _pull(trace, source, stacked.to(source.dtype), batched=True)
    return {i: widen(rows) for i, rows in pulled.items()}


def _pull(trace: Trace, source: Tensor, grads: Tensor, *, batched: bool) -> dict[int, Tensor]:
    found = torch.autograd.grad(
        source, trace.params, grads, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )
    return {i: grad for i, grad in enumerate(found) if grad is not None}


def _squares_of(leaves: dict[int, Tensor]) -> Tensor:
    return torch.stack([squared_norms(rows) for rows in leaves.values()]).sum(0)
