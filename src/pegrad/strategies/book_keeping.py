"""`book_keeping`: one forward and one backward pass to the activations, then norms, then weighted sums."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pegrad.clipping import Grouping
from pegrad.numerics import arithmetic
from pegrad.problem import Leaves, Problem, Values
from pegrad.reductions.kept import KeptSums
from pegrad.strategies.traced import Traced, values


@dataclass(frozen=True)
class BookKeeping(Traced):
    """Keep, at every site, the input and the gradient at the output, or the stacked gradients where those are small.

    The weighted sum then needs no second backward pass: it is a native batched weight gradient, or a contraction of
    what the norms needed anyway.

    Source: Bu et al. 2022, "Differentially private optimization on large model at small cost" (BK, BK-MixOpt).
    """

    keeps: ClassVar[bool] = True

    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.clipped_sum`."""
        trace, kept = self.run(problem, lambda trace: KeptSums(trace, problem, self.choose, grouping))
        with arithmetic(problem.device):
            return kept.total(), kept.squared_norms(), values(trace)
