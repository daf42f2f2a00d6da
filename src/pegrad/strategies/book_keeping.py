"""`book_keeping`: one forward and one backward pass to the activations, then norms, then weighted sums."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from pegrad.strategies.base import Leaves, Problem, Values, bad_rows
from pegrad.strategies.book import Norms
from pegrad.strategies.traced import Traced, values


@dataclass(frozen=True)
class BookKeeping(Traced):
    """Keep, at every site, the input and the gradient at the output, or the stacked gradients where those are small.

    The weighted sum then needs no second backward pass: it is a native batched weight gradient, or a contraction of
    what the norms needed anyway.

    Source: Bu et al. 2022, "Differentially private optimization on large model at small cost" (BK, BK-MixOpt).
    """

    keeps: ClassVar[bool] = True

    def weighted_sum(self, problem: Problem, weigh: Callable[[Tensor], Tensor]) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.weighted_sum`."""
        trace, book = self.run(problem, partial(Norms, choose=self.choose, keep=True))
        squares = book.squared_norms()
        weights = weigh(squares)
        return book.weighted_sum(weights, bad_rows(squares, weights)), squares, values(trace)
