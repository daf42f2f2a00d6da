"""Mean and scatter of per-example gradients, number by number, and how those of two batches become those of both."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.numerics import zero_rows
from pegrad.plan.plan import Choose
from pegrad.problem import Leaves, Problem
from pegrad.reductions.base import Reduction
from pegrad.reductions.stack import ByLeaf
from pegrad.tracing.trace import Trace


class Moments(Reduction):
    """For each leaf the mean, then for each leaf the sum of squared deviations from it, padding left out.

    Both are like the leaf, in the dtype of a sum over the batch. At least one row must be an example.
    """

    by_example = False

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        means, scatters = zip(*(_moments(rows, problem) for rows in grads), strict=True)
        return [*means, *scatters]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Moments":
        """See `Reduction.receiver`."""
        return _Moments(trace, problem)


class _Moments(ByLeaf):
    def __init__(self, trace: Trace, problem: Problem) -> None:
        super().__init__(trace)
        self._problem = problem
        zeros = [torch.zeros_like(leaf, dtype=problem.sum_dtype(leaf)).detach() for leaf in problem.params]
        self._means, self._scatters = list(zeros), list(zeros)

    def visit(self, leaf: int, rows: Tensor) -> None:
        self._means[leaf], self._scatters[leaf] = _moments(rows, self._problem)

    def answer(self) -> Leaves:
        return [*self._means, *self._scatters]


def _moments(rows: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    dtype, padding = problem.sum_dtype(rows), None if problem.mask is None else ~problem.mask
    mean = zero_rows(rows, padding).sum(0, dtype=dtype) / problem.examples
    return mean, zero_rows(rows - mean, padding).square().sum(0, dtype=dtype)


class Scatter(NamedTuple):
    """How the gradients of some examples lie about their mean."""

    examples: int | Tensor
    """How many, at least 1."""
    means: Leaves
    scatters: Leaves
    """Sums of squared deviations from the mean: for each leaf one like it, or one scalar for all numbers."""

    def joined(self, other: "Scatter", squares: Callable[[Leaves], Leaves]) -> "Scatter":
        """Return mean and scatter of two batches' examples together.

        No sum of squares is taken away from another: whatever the mean is, the scatter keeps its digits.

        Args:
            other: of the other batch.
            squares: how the difference of two means is squared, to be added to scatters.

        Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", Equations 2.1.
        """
        examples = self.examples + other.examples
        between = [b - a for a, b in zip(self.means, other.means, strict=True)]
        means = [a + d * (other.examples / examples) for a, d in zip(self.means, between, strict=True)]
        weight = self.examples * other.examples / examples
        parts = zip(self.scatters, other.scatters, squares(between), strict=True)
        return Scatter(examples, means, [a + b + weight * square for a, b, square in parts])
