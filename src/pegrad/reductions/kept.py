"""Norms and weighted sums in one backward pass: what the sums will need is kept until the norms are known."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pegrad.clipping import Grouping, Weights
from pegrad.numerics import BLOCK, accumulator, squared_norms
from pegrad.plan.candidates import Candidate
from pegrad.plan.parts import Part
from pegrad.plan.plan import Choose, Group
from pegrad.problem import Leaves, Problem
from pegrad.reductions.guarded import Found
from pegrad.reductions.leaves import LeafSums
from pegrad.reductions.native import stacked_parts, stacked_pieces
from pegrad.reductions.norms import Finish, Norms
from pegrad.tracing.trace import Trace

_SMALL = 1 << 12  # numbers of a leaf of which an operation takes longer to begin than to run


class KeptSums(Norms):
    """Norms, and the weighted sum of each clipping group as soon as the last of its norms is known.

    What was kept for a group is let go then. With one group that is at the end of the backward pass; with a group for
    every layer it is layer by layer, and next to nothing is kept. Rows of small leaves are kept side by side: one norm
    and one product for all.

    Args:
        trace: see `Norms`.
        problem: see `Norms`.
        choose: see `Norms`.
        grouping: see `Norms`.
    """

    def __init__(self, trace: Trace, problem: Problem, choose: Choose, grouping: Grouping) -> None:
        super().__init__(trace, problem, choose, grouping)
        self._mask = problem.mask
        self._sums = LeafSums(trace, self.plan.uses, self.rows)
        self._finish: list[list[tuple[int, Finish]]] = [[] for _ in grouping.weightings]
        self._small: list[list[tuple[Tensor, Tensor]]] = [[] for _ in grouping.weightings]
        """For each clipping group rows `(B, *source.shape)`, by source, that are entered but not measured."""
        self._numbers = [0] * len(grouping.weightings)
        """How many numbers those have."""
        self._found: list[dict[Group, Found]] = [{} for _ in grouping.weightings]
        """For each clipping group the norms that were found, but not looked at yet: at all of them at once."""
        self._awaited = [0] * len(grouping.weightings)
        for group in self.plan.groups:
            if group.way != "stacked":
                self._awaited[grouping.of[self.plan.leaf(group.source)]] += 1
        for leaf, uses in enumerate(self.plan.stacked):
            self._awaited[grouping.of[leaf]] += uses > 0

    def squared_norms(self) -> Tensor:
        """See `Norms.squared_norms`."""
        for together in range(len(self._small)):
            self._measure_waiting(together)
        return super().squared_norms()

    def total(self) -> Leaves:
        """Return the weighted sum for each leaf, once all is entered."""
        for together in range(len(self._finish)):
            self._measure_waiting(together)
            if self._finish[together]:  # the loss does not depend on all of the group's leaves after all
                self._sum(together)
        return self._sums.leaves()

    def measured(self, together: int, squares: Tensor, finish: Finish, frees: int = 0, groups: int = 1) -> None:
        """See `Norms.measured`; of so many groups of uses."""
        super().measured(together, squares, finish)
        self._finish[together].append((frees, finish))
        self._awaited[together] -= groups
        if not self._awaited[together]:
            self._sum(together)
        else:
            self._measure_last(together)

    def _waiting(self, together: int) -> int:
        return len(self._small[together]) + len(self._found[together])

    def _measure_last(self, together: int) -> None:
        """Measure what waits to be, if nothing else of its clipping group will come in."""
        if self._awaited[together] == self._waiting(together):
            self._measure_waiting(together)

    def _measure_waiting(self, together: int) -> None:
        self._measure_small(together)
        self._measure_found(together)

    def _enter_found(self, group: Group, found: Found, together: int) -> None:
        self._found[together][group] = found
        self._measure_last(together)

    def _measure_found(self, together: int) -> None:
        found, self._found[together] = self._found[together], {}
        self._look(found, together)

    def _enter_kept(self, group: Group, choice: Candidate, parts: list[Part], together: int) -> None:
        if self._awaited[together] == self._waiting(together) + 1:
            self._measure_waiting(together)
            self._enter_last(group, choice, parts, together)
            return
        self._enter_rows(together, group.source, stacked_pieces(choice.kernels, parts, self.batch))

    def _enter_rows(self, together: int, source: Tensor, pieces: Sequence[Tensor]) -> None:
        if len(pieces) > 1 or source.numel() > _SMALL:
            super()._enter_rows(together, source, pieces)
            return
        (rows,), small = pieces, self._small[together]
        if self._numbers[together] > BLOCK or (small and small[0][1].dtype != rows.dtype):
            self._measure_small(together)
        self._small[together].append((source, rows))
        self._numbers[together] += rows.numel()
        self._measure_last(together)

    def _measure_small(self, together: int) -> None:
        """Measure a clipping group's small leaves that have been entered, all in one."""
        small, self._small[together], self._numbers[together] = self._small[together], [], 0
        if not small:
            return
        sources = [source for source, _ in small]
        rows = torch.cat([rows.reshape(len(rows), source.numel()) for source, rows in small], 1)
        dtype = accumulator(rows.dtype, self.rows)

        def finish(weights: Weights) -> list[tuple[Tensor, Tensor]]:
            totals = weights.contract(rows, dtype).split([source.numel() for source in sources])
            return [(s, total.reshape(s.shape).clone()) for s, total in zip(sources, totals, strict=True)]

        self.measured(together, squared_norms(rows), finish, rows.numel(), len(small))

    def _enter_last(self, group: Group, choice: Candidate, parts: list[Part], together: int) -> None:
        """Enter the last uses of a clipping group: a weight is known with its norm, so few rows are kept."""
        weighting, before = self.grouping.weightings[together], self._squares[together]
        squares: list[Tensor] = []
        totals: list[tuple[Tensor, Tensor]] = []
        start = 0
        for rows in stacked_parts(choice.kernels, parts, self.batch):
            some = slice(start, start + len(rows))
            squares.append(squared_norms(rows))
            mask = None if self._mask is None else self._mask[some]
            weights = Weights.of(weighting, before[some] + squares[-1], mask)
            summed = weights.contract(rows, accumulator(rows.dtype, self.rows))
            totals = [(group.source, totals[0][1].add_(summed) if totals else summed)]
            start += len(rows)
        self.measured(together, torch.cat(squares), lambda _: totals)

    def _sum(self, together: int) -> None:
        weights = Weights.of(self.grouping.weightings[together], self._squares[together], self._mask)
        waiting = self._finish[together]
        waiting.sort(key=lambda finish: min(finish[0], 0))
        while waiting:  # what was kept is let go, use by use, first what makes room for the others
            _, finish = waiting.pop()
            for source, total in finish(weights):
                self._sums.add(source, total)
