"""A backward pass, received group by group of the plan: what norms and sums have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from pegrad.numerics import widen
from pegrad.plan.parts import Part
from pegrad.plan.plan import Group, Plan
from pegrad.reductions.leaves import LeafAccumulator, stack_rows
from pegrad.rules.site import Site
from pegrad.tracing.taps import Tapped
from pegrad.tracing.trace import Trace


class Grouped(ABC):
    """Collects what comes in for each group until its last use has, and hands it on.

    Args:
        trace: the trace that will be run backward.
        plan: its groups.
    """

    def __init__(self, trace: Trace, plan: Plan) -> None:
        self.trace = trace
        self.plan = plan
        self.batch = trace.losses.shape[0]
        self._entered: dict[Group, list[tuple[Site, Tensor, Tensor]]] = {}
        self._stacked = LeafAccumulator(trace, plan.uses, plan.stacked)

    @abstractmethod
    def enter(self, group: Group, parts: list[Part]) -> None:
        """Enter the uses of a group that is not stacked, those of one kind taken for one."""

    @abstractmethod
    def enter_stacked(self, leaf: int, source: Tensor, stacked: Tensor) -> None:
        """Enter gradients at a leaf, or an isometric part of it: `(B, *source.shape)`."""

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """See `Receiver.receive`."""
        x, g = widen(x), widen(g)
        for site in sorted(tapped.sites, key=lambda site: site.source.numel()):  # the largest has the least to wait for
            group = self.plan.of[id(site.source)]
            if group.way == "stacked":
                self._complete(self._stacked.add(site.source, stack_rows(site, x, g)))
                continue
            entered = self._entered.setdefault(group, [])
            entered.append((site, x, g))
            if len(entered) == len(group.sites):
                self._hand_on(group)

    def receive_copies(self, grads: list[Tensor]) -> None:
        """See `Receiver.receive_copies`."""
        for copies, grad in zip(self.trace.copies, grads, strict=True):
            if self.plan.of[id(copies.source)].way == "stacked":
                self._complete(self._stacked.add(copies.source, grad))
            else:
                self.enter_stacked(self.plan.leaf(copies.source), copies.source, grad)
        self._complete(self._stacked.rest())
        for group in list(self._entered):  # the loss does not depend on some of their uses after all
            self._hand_on(group)

    def _hand_on(self, group: Group) -> None:
        entered = self._entered.pop(group)
        parts = group.joined(entered[::-1], self.batch)  # a backward pass comes from behind
        entered.clear()
        self.enter(group, parts)

    def _complete(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self.enter_stacked(leaf, self.trace.params[leaf], rows)
