"""`auto`: the strategy that is fastest as a rule."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from pegrad.clipping import Grouping
from pegrad.problem import Leaves, Problem, Values
from pegrad.reductions.base import Reduction
from pegrad.strategies.base import Strategy
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.strategies.fallback import stepping_down
from pegrad.strategies.grouped_conv import GroupedConv
from pegrad.torch_internals import transformed

T = TypeVar("T")

_BOOK_KEEPING = BookKeeping()  # one, for it remembers its choices


class Auto(Strategy):
    """Book-keeping; the loop, with a warning, for what that cannot run.

    Under a transform of torch.func it is `grouped_conv`: that one composes.
    """

    def reduce(self, problem: Problem, reduction: Reduction) -> tuple[Leaves, Values]:
        """See `Strategy.reduce`."""
        return self._ask(problem, lambda strategy, problem: strategy.reduce(problem, reduction))

    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.clipped_sum`."""
        return self._ask(problem, lambda strategy, problem: strategy.clipped_sum(problem, grouping))

    @staticmethod
    def _ask(problem: Problem, ask: Callable[[Strategy, Problem], T]) -> T:
        if transformed():
            return ask(GroupedConv(), problem)
        return stepping_down(_BOOK_KEEPING, problem, ask)
