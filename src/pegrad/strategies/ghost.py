"""`ghost`: norms in a first backward pass, the clipped sum in a second; the memory of ordinary training."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.numerics import arithmetic
from pegrad.reductions.norms import Norms, Sums
from pegrad.strategies.base import Leaves, Problem, Values, bad_rows
from pegrad.strategies.traced import Traced, values


@dataclass(frozen=True)
class Ghost(Traced):
    """Find the norms site by site, keep nothing, and run the same backward pass again for the sum.

    The second pass starts from the losses as the first did, and each site weighs what it receives. Weights that came
    in through the losses would be rounded to the losses' dtype, and be lost in a backward function that is not linear.

    Source: Li et al. 2022 (ghost clipping); Bu, Mao & Xu 2022 (mixed ghost clipping: the choice at every site).
    """

    def weighted_sum(self, problem: Problem, weighting: Weighting) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.weighted_sum`."""
        make = partial(Norms, choose=self.choose_norm, floor=weighting.clip_norm, rows=problem.sum_rows)
        trace, norms = self.run(problem, make, last=False)
        with arithmetic(problem.device):
            squares = norms.squared_norms()
            weights = weighting.weights(squares, problem.mask)
            sums = Sums(norms, weights, bad_rows(squares, weights), weighting)
            self.run_back(problem, trace, sums)
            return sums.total(), squares, values(trace)
