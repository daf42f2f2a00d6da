"""Stacked gradients, leaf by leaf."""

from abc import abstractmethod
from collections.abc import Iterator

from torch import Tensor

from pegrad.numerics import widen
from pegrad.plan.plan import Choose
from pegrad.plan.uses import ParameterUses
from pegrad.problem import Leaves, Problem
from pegrad.reductions.base import Reduction
from pegrad.reductions.leaves import LeafAccumulator, stack_rows
from pegrad.rules.site import Site
from pegrad.tracing.taps import Tapped
from pegrad.tracing.trace import Trace


class ByLeaf:
    """Receives a backward pass leaf by leaf: each leaf's stacked gradient is shown once all its uses have come in.

    Args:
        trace: the trace that will be run backward.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.uses = ParameterUses.of(trace)
        self._leaves = LeafAccumulator(trace, self.uses)

    @abstractmethod
    def visit(self, leaf: int, rows: Tensor) -> None:
        """See the stacked gradient of a leaf that the loss depends on, `(B, *leaf.shape)`, once, before it is gone."""

    def takes(self, site: Site, x: Tensor, g: Tensor) -> bool:
        """Answer for a use whose gradients then need not be stacked; False: they do."""
        return False

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Receiver.receive`."""
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            if not self.takes(site, x, g):
                self._show(self._leaves.add(site.source, stack_rows(site, x, g)))

    def receive_copies(self, grads: list[Tensor]) -> None:
        """See `Receiver.receive_copies`."""
        for copies, grad in zip(self.trace.copies, grads, strict=True):
            self._show(self._leaves.add(copies.source, grad))
        self._show(self._leaves.rest())

    def _show(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self.visit(leaf, rows)


class Stack(Reduction):
    """The stacked gradients themselves, for each leaf one tensor `(B, *leaf.shape)` in its dtype."""

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        return grads

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Stacked":
        """See `Reduction.receiver`."""
        return _Stacked(trace)


class _Stacked(ByLeaf):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._found: dict[int, Tensor] = {}

    def visit(self, leaf: int, rows: Tensor) -> None:
        self._found[leaf] = rows

    def answer(self) -> Leaves:
        batch = len(self.trace.losses)
        return [
            self._found.pop(i).to(leaf.dtype) if i in self._found else leaf.detach().new_zeros(batch, *leaf.shape)
            for i, leaf in enumerate(self.trace.params)
        ]
