"""`auto`: the strategy that is fastest as a rule."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.strategies.base import Leaves, Problem, Strategy, Values
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.strategies.fallback import stepping_down
from pegrad.strategies.grouped_conv import GroupedConv
from pegrad.tracing.batched import transformed

T = TypeVar("T")

_BOOK_KEEPING = BookKeeping()  # one, for it remembers its choices


class Auto(Strategy):
    """Book-keeping; the loop, with a warning, for what that cannot run.

    Under a transform of torch.func it is `grouped_conv`: that one composes.
    """

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Strategy.stacked`."""
        return self._ask(problem, lambda strategy, problem: strategy.stacked(problem))

    def squared_norms(self, problem: Problem) -> tuple[Tensor, Values]:
        """See `Strategy.squared_norms`."""
        return self._ask(problem, lambda strategy, problem: strategy.squared_norms(problem))

    def weighted_sum(self, problem: Problem, weighting: Weighting) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.weighted_sum`."""
        return self._ask(problem, lambda strategy, problem: strategy.weighted_sum(problem, weighting))

    @staticmethod
    def _ask(problem: Problem, ask: Callable[[Strategy, Problem], T]) -> T:
        if transformed():
            return ask(GroupedConv(), problem)
        return stepping_down(_BOOK_KEEPING, problem, ask)
