"""What a strategy is: two answers to two questions about the per-example gradients of one loss."""

from abc import ABC, abstractmethod

from torch import Tensor

from pegrad.clipping import Grouping, Weights
from pegrad.numerics import arithmetic
from pegrad.problem import Leaves, Problem, Values
from pegrad.reductions.base import Reduction
from pegrad.reductions.norms import SquaredNorms


class Strategy(ABC):
    """A way to compute per-example gradients, or what becomes of them, and their clipped sum."""

    @abstractmethod
    def reduce(self, problem: Problem, reduction: Reduction) -> tuple[Leaves, Values]:
        """Return what a reduction makes of the examples' gradients.

        Args:
            problem: loss, parameters and batch.
            reduction: what: `Stack`, `SquaredNorms`, `Dots`, ...
        """

    @abstractmethod
    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """Return the weighted sum of the examples' gradients, the weights being functions of their norms.

        Args:
            problem: loss, parameters and batch.
            grouping: which leaves' norms are taken together, and from squared norms `(B,)` to weights `(B,)`. A row
                of weight zero contributes exactly zero, whatever its gradient is: also where that is not finite.

        Returns:
            The sum, for each parameter leaf one tensor of its shape in `problem.sum_dtype`; the squared norms
            `(B, G)`, in float64; the values.
        """


class Stacking(Strategy):
    """A strategy that need only know how to stack gradients: from those follows all else."""

    @abstractmethod
    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """Return every example's gradient: for each parameter leaf one tensor `(B, *leaf.shape)`."""

    def reduce(self, problem: Problem, reduction: Reduction) -> tuple[Leaves, Values]:
        """See `Strategy.reduce`."""
        grads, values = self.stacked(problem)
        with arithmetic(problem.device):
            return reduction.of_stacked(grads, problem), values

    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.clipped_sum`."""
        grads, values = self.stacked(problem)
        with arithmetic(problem.device):
            (squares,) = SquaredNorms(grouping.of).of_stacked(grads, problem)
            weights = weigh(grouping, squares, problem.mask)
            sums = [
                weights[group].contract(grad, problem.sum_dtype(grad))
                for group, grad in zip(grouping.of, grads, strict=True)
            ]
        return sums, squares, values


def weigh(grouping: Grouping, squares: Tensor, mask: Tensor | None) -> list[Weights]:
    """Weigh the examples in each clipping group by its squared norms, `(B, G)`."""
    columns = zip(grouping.weightings, squares.unbind(1), strict=True)
    return [Weights.of(weighting, column, mask) for weighting, column in columns]
