"""Norms of each clipping group, and the weighted sums in a second backward pass."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pegrad.assumptions import any_row, unrecorded
from pegrad.clipping import Grouping, Unclipped, Weights
from pegrad.numerics import accumulator, squared_norms
from pegrad.plan.candidates import Candidate, stack_kernel
from pegrad.plan.parts import Part
from pegrad.plan.plan import Choose, Group, Plan, shaped
from pegrad.problem import Leaves, Problem
from pegrad.reductions import rounding
from pegrad.reductions.base import Reduction
from pegrad.reductions.grouped import Grouped
from pegrad.reductions.guarded import Found, Magnitudes, guarded
from pegrad.reductions.leaves import LeafSums, pull_rows, squares_of
from pegrad.reductions.native import NativeSum, stacked_parts
from pegrad.tracing.trace import Trace

Finish = Callable[[Weights], Sequence[tuple[Tensor, Tensor]]]
"""From weights to tensors, each with what is to be added to the gradient there."""


class SquaredNorms(Reduction):
    """The squared norm of each group's gradient: one tensor `(B, G)`, in float64.

    Args:
        groups: for each leaf its group; None: all are in one.
    """

    def __init__(self, groups: Sequence[int] | None = None) -> None:
        self._groups = groups

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        groups = self._groups or (0,) * len(grads)
        zeros = torch.zeros(problem.batch_size, dtype=torch.float64, device=problem.device)
        squares = [zeros] * (1 + max(groups))
        for group, grad in zip(groups, grads, strict=True):
            squares[group] = squares[group] + squared_norms(grad)
        return [torch.stack(squares, 1)]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "Norms":
        """See `Reduction.receiver`."""
        groups = tuple(self._groups or (0,) * len(problem.params))
        return Norms(trace, problem, choose, Grouping(groups, (Unclipped(),) * (1 + max(groups))))


class Norms(Grouped):
    """Squared norms of each clipping group, and what the weighted sum will need.

    The uses of one parameter find their norms together, by the kernels chosen for them. Where that cannot be, their
    gradients are stacked and added before the norm is taken.

    A stacked gradient is safe as it is: what is weighed is what was measured. Where the sum is a product of its own,
    or the norm a difference of large numbers, `NativeSum` and `guarded` see to it that both are of one gradient.

    Args:
        trace: the trace that will be run backward.
        problem: what it is the trace of.
        choose: how norms are found.
        grouping: the clipping groups.
    """

    def __init__(self, trace: Trace, problem: Problem, choose: Choose, grouping: Grouping) -> None:
        super().__init__(trace, Plan(trace, choose, problem.sum_rows, grouping.of))
        self.grouping = grouping
        self.rows = problem.sum_rows
        self.native: dict[Group, NativeSum] = {}
        """For each group of uses whose sum will be native, how."""
        self._choose = choose
        start = torch.zeros(self.batch, dtype=torch.float64, device=problem.device)
        self._squares = [start] * len(grouping.weightings)

    def squared_norms(self) -> Tensor:
        """Return the squared norms, `(B, G)`, in float64, once all is entered."""
        return torch.stack(self._squares, 1)

    def answer(self) -> Leaves:
        """See `Receiver.answer`."""
        return [self.squared_norms()]

    def enter(self, group: Group, parts: list[Part]) -> None:
        """See `Grouped.enter`."""
        together = self.grouping.of[self.plan.leaf(group.source)]
        if group.way == "made":
            self._enter_made(group, parts[0], together)
            return
        choice = group.choice
        if choice is None or len(choice.kernels) != len(parts):  # some uses did not come in
            choice = self._choose(shaped(parts))
        self._enter_joint(group, choice, parts, together)

    def enter_stacked(self, leaf: int, source: Tensor, stacked: Tensor) -> None:
        """See `Grouped.enter_stacked`."""
        self._enter_rows(self.grouping.of[leaf], source, [stacked])

    def measured(self, together: int, squares: Tensor, finish: Finish, frees: int = 0) -> None:
        """Take note of the squared norms of a part of a clipping group.

        Args:
            together: the clipping group.
            squares: `(B,)`.
            finish: how the sum will be found.
            frees: how many numbers can be let go then, more than the sum has.
        """
        self._squares[together] = self._squares[together] + squares

    def _enter_joint(self, group: Group, choice: Candidate, parts: list[Part], together: int) -> None:
        if choice.keeps:  # the sum is one of stacked gradients
            self._enter_kept(group, choice, parts, together)
            return
        self._enter_found(group, Found.by(choice, parts, self.batch), together)

    def _enter_found(self, group: Group, found: Found, together: int) -> None:
        self._look({group: found}, together)

    def _look(self, found: Mapping[Group, Found], together: int) -> None:
        """Look at what was found for some groups of uses, and enter it."""
        looked = guarded([*found.values()], self.batch, self.grouping.weightings[together].floor)
        for (group, each), (squares, shares) in zip(found.items(), looked, strict=True):
            self._enter_native(group, NativeSum(group.source, shares), each.parts, together, squares)

    def _enter_kept(self, group: Group, choice: Candidate, parts: list[Part], together: int) -> None:
        pieces = stacked_parts(choice.kernels, parts, self.batch)
        self.measured(together, torch.cat([squared_norms(rows) for rows in pieces]), _unknown)

    def _enter_rows(self, together: int, source: Tensor, pieces: Sequence[Tensor]) -> None:
        dtype = accumulator(pieces[0].dtype, self.rows)
        squares = torch.cat([squared_norms(rows) for rows in pieces])
        frees = sum(rows.numel() for rows in pieces) - source.numel()
        self.measured(together, squares, lambda weights: [(source, weights.contract_pieces(pieces, dtype))], frees)

    def _enter_made(self, group: Group, part: Part, together: int) -> None:
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
        gain = torch.cat([gains.masked_fill(~torch.isfinite(gains), 0), typical]).max().sqrt()
        errors = Magnitudes(site, x, g).share_errors() * gain + noise * sources.sqrt()
        floor = self.grouping.weightings[together].floor
        norms = squares.sqrt().clamp(min=floor)
        shared = isinstance(floor, Tensor) or floor > 0
        apart = rounding.mistrusted_shares(norms.reciprocal(), errors, 1.0, part.positions) if shared else errors < 0
        native = NativeSum(site.source, [errors], gain, apart)
        for row in apart.nonzero().squeeze(1).tolist() if any_row(apart) else ():
            alone = part.rows(row, row + 1, self.batch)
            pulled = pull_rows(self.trace, site.source, kernel.run(alone.x, alone.g))
            squares[row] = squares_of(pulled)[0]
            native.made.extend(
                (self.trace.params[leaf], apart.new_tensor([row], dtype=torch.int64), rows)
                for leaf, rows in pulled.items()
            )
        self._enter_native(group, native, [part], together, squares)

    def _way_to_leaves(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Try how gradients come from a source to the leaves.

        Returns:
            How much longer random ones of norm one become, squared, `(b,)`; and how long what rounding makes of them on
            the way may be, known by that they do not add up. Where nearly all of a gradient cancels, that is all there
            is of it at the leaves.
        """
        with unrecorded():
            generator = torch.Generator().manual_seed(0)
            probes = torch.randn(_PROBES, *source.shape, generator=generator).to(source)
        probes = probes / probes.flatten(1).norm(dim=1).reshape(-1, *[1] * source.dim())
        pulled = pull_rows(self.trace, source, torch.cat([probes, probes.sum(0, keepdim=True)]))
        apart = {leaf: rows[:-1].sum(0, keepdim=True) - rows[-1:] for leaf, rows in pulled.items()}
        noise = _NOISE * squares_of(apart).sqrt()
        return squares_of({leaf: rows[:-1] for leaf, rows in pulled.items()}), noise

    def _enter_native(
        self, group: Group, native: NativeSum, parts: Sequence[Part], together: int, squares: Tensor
    ) -> None:
        self.native[group] = native
        dtype = accumulator(parts[0].g.dtype, self.rows)
        frees = sum(part.numbers for part in parts) - group.source.numel()
        self.measured(together, squares, partial(native.totals, parts, dtype=dtype), frees)


_PROBES = 4
_NOISE = 8.0  # what the probes show of it, and a margin


def _unknown(weights: Weights) -> Sequence[tuple[Tensor, Tensor]]:
    raise AssertionError("nothing was kept for the sum")


class Sums(Grouped):
    """The weighted sum, found in a second backward pass like the one in which the norms were.

    Args:
        norms: what the first pass was turned into.
        weights: for each clipping group.
    """

    def __init__(self, norms: Norms, weights: Sequence[Weights]) -> None:
        super().__init__(norms.trace, norms.plan)
        self._norms = norms
        self._weights = weights
        self._sums = LeafSums(norms.trace, norms.plan.uses, norms.rows)

    def enter(self, group: Group, parts: list[Part]) -> None:
        """See `Grouped.enter`."""
        leaf = self.plan.leaf(group.source)
        native = self._norms.native.get(group)
        if native is not None:
            dtype = accumulator(parts[0].g.dtype, self._norms.rows)
            for source, total in native.totals(parts, self._of(leaf), dtype):
                self._sums.add(source, total)
            return
        start = 0
        for rows in stacked_parts([stack_kernel(p.site, p.x, p.g) for p in parts], parts, self.batch):
            self._add(leaf, group.source, rows, start)
            start += len(rows)

    def enter_stacked(self, leaf: int, source: Tensor, stacked: Tensor) -> None:
        """See `Grouped.enter_stacked`."""
        self._add(leaf, source, stacked)

    def answer(self) -> Leaves:
        """See `Receiver.answer`: the weighted sum for each leaf."""
        return self._sums.leaves()

    def _of(self, leaf: int) -> Weights:
        return self._weights[self._norms.grouping.of[leaf]]

    def _add(self, leaf: int, source: Tensor, rows: Tensor, start: int = 0) -> None:
        weights = self._of(leaf)[start : start + len(rows)]
        self._sums.add(source, weights.contract(rows, accumulator(rows.dtype, self._norms.rows)))
