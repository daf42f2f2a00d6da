"""What a strategy is: three answers to three questions about the per-example gradients of one loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import numerics
from pegrad.clipping import Weighting
from pegrad.numerics import accumulator, arithmetic, contract
from pegrad.tracing.batched import transformed

Leaves = list[Tensor]
FlatLoss = Callable[[Leaves, Leaves], tuple[Tensor, Leaves]]
"""`(parameter leaves, leaves of one example) -> (scalar loss, leaves of aux)`."""


@dataclass(frozen=True)
class Problem:
    """One loss, at one set of parameters, on one batch of at least one example."""

    loss: FlatLoss
    params: Leaves
    batch: Leaves  # each (B, ...)
    mask: Tensor | None = None  # (B,), boolean; False marks padding
    whole: int = 0  # rows of the call that these may be a part of; 0: they are all

    @property
    def batch_size(self) -> int:
        """Number of rows `B`."""
        return self.batch[0].shape[0]

    @property
    def sum_rows(self) -> int:
        """How many rows will be summed in all, of which these may be some: it decides the dtype of the sum."""
        return self.whole or self.batch_size

    @property
    def device(self) -> torch.device:
        """Where the arithmetic takes place."""
        return self.params[0].device

    def sum_dtype(self, leaf: Tensor) -> torch.dtype:
        """Return the dtype of a sum of gradients of a leaf."""
        return accumulator(leaf.dtype, self.sum_rows)


class Values(NamedTuple):
    """What the forward pass gives for each example."""

    losses: Tensor  # (B,)
    aux: Leaves  # each (B, ...)


class Strategy(ABC):
    """A way to compute per-example gradients, their norms and their clipped sum.

    A strategy need only know how to stack gradients; one that has a cheaper way to the other two answers
    overrides them.
    """

    @abstractmethod
    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """Return every example's gradient: for each parameter leaf one tensor `(B, *leaf.shape)`."""

    def squared_norms(self, problem: Problem) -> tuple[Tensor, Values]:
        """Return the squared norm of each example's gradient over all leaves, `(B,)`, in float64."""
        grads, values = self.stacked(problem)
        with arithmetic(problem.device):
            return squared_norms(grads), values

    def weighted_sum(self, problem: Problem, weighting: Weighting) -> tuple[Leaves, Tensor, Values]:
        """Return the weighted sum of the examples' gradients, the weights being a function of their norms.

        Args:
            problem: loss, parameters and batch.
            weighting: squared norms `(B,)` to weights `(B,)`. A row of weight zero contributes exactly zero,
                whatever its gradient is: also where that is not finite.

        Returns:
            The sum, for each parameter leaf one tensor of its shape in `problem.sum_dtype`; the squared norms, in
            float64; the values.
        """
        grads, values = self.stacked(problem)
        with arithmetic(problem.device):
            squares = squared_norms(grads)
            weights = weighting.weights(squares, problem.mask)
            bad = bad_rows(squares, weights)
            return [contract(weights, grad, bad, problem.sum_dtype(grad)) for grad in grads], squares, values


def squared_norms(grads: Leaves) -> Tensor:
    """Sum of squares of each row over all leaves: `(B, ...)` leaves to `(B,)`, in float64."""
    return torch.stack([numerics.squared_norms(grad) for grad in grads]).sum(0)


def bad_rows(squares: Tensor, weights: Tensor) -> Tensor | None:
    """Mark the rows to leave out of a sum because zero times what they hold might not be zero.

    Args:
        squares: squared norms, `(B,)`.
        weights: weights in the sum, `(B,)`; zero wherever the squared norm is not finite.

    Returns:
        `(B,)`, boolean; or None where all rows are known to be finite.
    """
    if not transformed() and bool(torch.isfinite(squares).all()):
        return None
    return weights == 0
