"""Norms over all leaves, and the weighted sum: from what the norms kept, or in a second backward pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.numerics import accumulator, contract, squared_norms
from pegrad.plan.candidates import Candidate, stack_kernel
from pegrad.plan.parts import Part
from pegrad.plan.plan import Choose, Group, Plan, shaped
from pegrad.reductions import rounding
from pegrad.reductions.grouped import Grouped
from pegrad.reductions.leaves import Leaves, Totals, gather, pull_rows, squares_of
from pegrad.reductions.native import Magnitudes, NativeSum, guarded_norms, stacked_parts
from pegrad.tracing.trace import Trace

Finish = Callable[[Tensor, Tensor | None, Weighting], Totals]
"""`(weights, bad rows or None, weighting) -> Totals`"""


class Norms(Grouped):
    """Squared norms over all leaves, and what the weighted sum will need.

    The uses of one parameter find their norms together, by the kernels chosen for them. Where that cannot be, their
    gradients are stacked and added before the norm is taken.

    A stacked gradient is safe as it is: what is weighed is what was measured. Where the sum is a product of its own,
    or the norm a difference of large numbers, `NativeSum` and `guarded_norms` see to it that both are of one gradient.

    Args:
        trace: the trace that will be run backward.
        choose: how norms are found.
        floor: the norm below which nothing depends on it.
        rows: how many rows will be summed in all: see `Problem.rows`.
        keep: whether what `weighted_sum` needs is kept, so that no second backward pass is needed.
    """

    def __init__(self, trace: Trace, choose: Choose, *, floor: float = 0.0, rows: int = 1, keep: bool = False) -> None:
        super().__init__(trace, Plan(trace, choose, rows))
        self.rows = rows
        self.native: dict[Group, NativeSum] = {}
        """For each group whose sum will be native, how."""
        self._choose = choose
        self._floor = floor
        self._keep = keep
        self._squares: list[Tensor] = []
        self._sums: list[Finish] = []

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
        return gather(self.trace, self.plan, totals, self.rows)

    def enter(self, group: Group, parts: list[Part]) -> None:
        """See `Grouped.enter`."""
        if group.way == "made":
            self._enter_made(group, parts[0])
            return
        choice = group.choice
        if choice is None or len(choice.kernels) != len(parts):  # some uses did not come in
            choice = self._choose(shaped(parts))
        self._enter_joint(group, choice, parts)

    def enter_stacked(self, source: Tensor, stacked: Tensor) -> None:
        """See `Grouped.enter_stacked`."""
        self._squares.append(squared_norms(stacked))
        if self._keep:
            dtype = accumulator(stacked.dtype, self.rows)
            self._sums.append(lambda weights, bad, weighting: [(source, contract(weights, stacked, bad, dtype))])

    def _enter_joint(self, group: Group, choice: Candidate, parts: list[Part]) -> None:
        if not choice.keeps:
            squares, shares = guarded_norms(choice, parts, self.batch, self._floor)
            self._squares.append(squares)
            self._sum_natively(group, NativeSum(group.source, shares), parts)
        elif self._keep:  # the sum is one of stacked gradients
            self.enter_stacked(group.source, next(stacked_parts(choice.kernels, parts, self.batch, self.batch)))
        else:
            pieces = stacked_parts(choice.kernels, parts, self.batch)
            self._squares.append(torch.cat([squared_norms(rows) for rows in pieces]))

    def _enter_made(self, group: Group, part: Part) -> None:
        """Enter the only use of leaves that the source was made of by more than an isometry.

        What is made of the leaves may leave a part of a gradient out, and a row may consist of little else: rows whose
        gradient at the source is long beside that at the leaves are kept at the leaves, and out of the sum.
        """
        site, x, g, _ = part
        kernel = stack_kernel(site, x, g)
        at_source, at_leaves = [], []
        for rows in stacked_parts([kernel], [part], self.batch):
            at_source.append(squared_norms(rows))
            at_leaves.append(squares_of(pull_rows(self.trace, site.source, rows)))
        squares, sources = torch.cat(at_leaves), torch.cat(at_source)
        gains = squares / sources
        typical, noise = self._way_to_leaves(site.source)
        gain = float(torch.cat([gains[torch.isfinite(gains)], typical]).max().sqrt())
        errors = Magnitudes(site, x, g).share_errors() * gain + noise * sources.sqrt()
        norms = squares.sqrt().clamp(min=self._floor)
        apart = (
            rounding.mistrusted_shares(norms.reciprocal(), errors, 1.0, part.positions) if self._floor else errors < 0
        )
        native = NativeSum(site.source, [errors], gain, apart)
        for row in apart.nonzero().squeeze(1).tolist():
            alone = part.rows(row, row + 1, self.batch)
            pulled = pull_rows(self.trace, site.source, kernel.run(alone.x, alone.g))
            squares[row] = squares_of(pulled)[0]
            native.made.extend(
                (self.trace.params[leaf], apart.new_tensor([row], dtype=torch.int64), rows)
                for leaf, rows in pulled.items()
            )
        self._squares.append(squares)
        self._sum_natively(group, native, [part])

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
        noise = _NOISE * float(squares_of(apart).sqrt())
        return squares_of({leaf: rows[:-1] for leaf, rows in pulled.items()}), noise

    def _sum_natively(self, group: Group, native: NativeSum, parts: list[Part]) -> None:
        self.native[group] = native
        if self._keep:
            dtype = accumulator(parts[0].g.dtype, self.rows)
            self._sums.append(partial(native.totals, parts, dtype=dtype))


_PROBES = 4
_NOISE = 8.0  # what the probes show of it, and a margin


class Sums(Grouped):
    """The weighted sum, found in a second backward pass like the one in which the norms were.

    Args:
        norms: what the first pass was turned into.
        weights: `(B,)`.
        bad: `(B,)`, boolean: rows that may not be finite, whose weight is zero; None: no such row.
        weighting: where the weights come from.
    """

    def __init__(self, norms: Norms, weights: Tensor, bad: Tensor | None, weighting: Weighting) -> None:
        super().__init__(norms.trace, norms.plan)
        self._norms = norms
        self._weights = weights
        self._bad = bad
        self._weighting = weighting
        self._totals: list[tuple[Tensor, Tensor]] = []

    def enter(self, group: Group, parts: list[Part]) -> None:
        """See `Grouped.enter`."""
        native = self._norms.native.get(group)
        if native is not None:
            dtype = accumulator(parts[0].g.dtype, self._norms.rows)
            self._totals += native.totals(parts, self._weights, self._bad, self._weighting, dtype)
            return
        start = 0
        for rows in stacked_parts([stack_kernel(p.site, p.x, p.g) for p in parts], parts, self.batch):
            self._add(group.source, rows, start)
            start += len(rows)

    def enter_stacked(self, source: Tensor, stacked: Tensor) -> None:
        """See `Grouped.enter_stacked`."""
        self._add(source, stacked)

    def total(self) -> Leaves:
        """Return the weighted sum for each leaf, once all is entered."""
        return gather(self.trace, self.plan, self._totals, self._norms.rows)

    def _add(self, source: Tensor, rows: Tensor, start: int = 0) -> None:
        part = slice(start, start + len(rows))
        bad = None if self._bad is None else self._bad[part]
        dtype = accumulator(rows.dtype, self._norms.rows)
        self._totals.append((source, contract(self._weights[part], rows, bad, dtype)))
