"""`auto`: the strategy that is fastest as a rule."""

from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.strategies.base import Leaves, Problem, Strategy, Values
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.strategies.grouped_conv import GroupedConv
from pegrad.tracing.batched import transformed


class Auto(Strategy):
    """Book-keeping, except under a transform of torch.func, where it is `grouped_conv`: that one composes."""

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Strategy.stacked`."""
        return self._best().stacked(problem)

    def squared_norms(self, problem: Problem) -> tuple[Tensor, Values]:
        """See `Strategy.squared_norms`."""
        return self._best().squared_norms(problem)

    def weighted_sum(self, problem: Problem, weighting: Weighting) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.weighted_sum`."""
        return self._best().weighted_sum(problem, weighting)

    @staticmethod
    def _best() -> Strategy:
        return GroupedConv() if transformed() else BookKeeping()
