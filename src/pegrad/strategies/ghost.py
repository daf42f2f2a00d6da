"""`ghost`: norms in a first backward pass, the clipped sum in a second; the memory of ordinary training."""

from dataclasses import dataclass

from torch import Tensor

from pegrad.clipping import Grouping
from pegrad.numerics import arithmetic
from pegrad.problem import Leaves, Problem, Values
from pegrad.reductions.norms import Norms, Sums
from pegrad.strategies.base import weigh
from pegrad.strategies.traced import Traced, values


@dataclass(frozen=True)
class Ghost(Traced):
    """Find the norms site by site, keep nothing, and run the same backward pass again for the sum.

    The second pass starts from the losses as the first did, and each site weighs what it receives. Weights that came
    in through the losses would be rounded to the losses' dtype, and be lost in a backward function that is not linear.

    Source: Li et al. 2022 (ghost clipping); Bu, Mao & Xu 2022 (mixed ghost clipping: the choice at every site).
    """

    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.clipped_sum`."""
        trace, norms = self.run(problem, lambda t: Norms(t, problem, self.choose_norm, grouping), last=False)
        with arithmetic(problem.device):
            squares = norms.squared_norms()
            sums = Sums(norms, weigh(grouping, squares, problem.mask))
            self.run_back(problem, trace, sums)
            return sums.answer(), squares, values(trace)
