"""`book_keeping`: one forward and one backward pass to the activations, then norms, then weighted sums."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.numerics import arithmetic
from pegrad.reductions.norms import Norms
from pegrad.strategies.base import Leaves, Problem, Values, bad_rows
from pegrad.strategies.traced import Traced, values


@dataclass(frozen=True)
class BookKeeping(Traced):
    """Keep, at every site, the input and the gradient at the output, or the stacked gradients where those are small.

    The weighted sum then needs no second backward pass: it is a native batched weight gradient, or a contraction of
    what the norms needed anyway.

    Source: Bu et al. 2022, "Differentially private optimization on large model at small cost" (BK, BK-MixOpt).
    """

    keeps: ClassVar[bool] = True

    def weighted_sum(self, problem: Problem, weighting: Weighting) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.weighted_sum`."""
        make = partial(Norms, choose=self.choose, floor=weighting.clip_norm, rows=problem.sum_rows, keep=True)
        trace, norms = self.run(problem, make)
        with arithmetic(problem.device):
            squares = norms.squared_norms()
            weights = weighting.weights(squares, problem.mask)
            return norms.weighted_sum(weights, bad_rows(squares, weights), weighting), squares, values(trace)
