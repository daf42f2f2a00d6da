"""Stacked gradients, leaf by leaf."""

from collections.abc import Callable, Iterator

from torch import Tensor

from pegrad.numerics import widen
from pegrad.plan.uses import ParameterUses
from pegrad.reductions.leaves import LeafAccumulator, stack_rows
from pegrad.tracing.trace import Tapped, Trace

Visit = Callable[[int, Tensor], None]
"""`(leaf, its stacked gradient (B, *leaf.shape))`"""


class StackedGradients:
    """Stacked gradients, leaf by leaf: each is shown once all its uses have come in, and then forgotten.

    Args:
        trace: the trace that will be run backward.
        visit: called once for each leaf that the loss depends on.
    """

    def __init__(self, trace: Trace, visit: Visit) -> None:
        self._trace = trace
        self._visit = visit
        self._leaves = LeafAccumulator(trace, ParameterUses.of(trace))

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Reduction.receive`."""
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            self._show(self._leaves.add(site.source, stack_rows(site, x, g)))

    def receive_copies(self, grads: list[Tensor]) -> None:
        """See `Reduction.receive_copies`."""
        for copies, grad in zip(self._trace.copies, grads, strict=True):
            self._show(self._leaves.add(copies.source, grad))
        self._show(self._leaves.rest())

    def _show(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self._visit(leaf, rows)
