"""Mean and variance of per-example gradients, number by number."""

import torch
from torch import Tensor

from pegrad.plan.plan import Choose
from pegrad.problem import Leaves, Problem
from pegrad.reductions.base import Reduction
from pegrad.reductions.stack import ByLeaf
from pegrad.tracing.trace import Trace


class Moments(Reduction):
    """For each leaf its mean, then for each leaf its unbiased variance (NaN for one example), padding left out."""

    by_example = False

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        means, variances = zip(*(_moments(rows, problem.mask) for rows in grads), strict=True)
        return [*means, *variances]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Moments":
        """See `Reduction.receiver`."""
        return _Moments(trace, problem)


class _Moments(ByLeaf):
    def __init__(self, trace: Trace, problem: Problem) -> None:
        super().__init__(trace)
        self._mask = problem.mask
        zeros = [torch.zeros_like(leaf).detach() for leaf in problem.params]
        self._means, self._variances = list(zeros), list(zeros)

    def visit(self, leaf: int, rows: Tensor) -> None:
        self._means[leaf], self._variances[leaf] = _moments(rows, self._mask)

    def answer(self) -> Leaves:
        return [*self._means, *self._variances]


def _moments(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = rows if mask is None else rows[mask]
    mean = rows.mean(0)
    return mean, (rows - mean).square().sum(0) / (len(rows) - 1 or float("nan"))
