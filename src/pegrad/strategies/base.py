"""What a strategy is: three answers to three questions about the per-example gradients of one loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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

    @property
    def batch_size(self) -> int:
        """Number of rows `B`."""
        return self.batch[0].shape[0]


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
        """Return the squared norm of each example's gradient over all leaves, `(B,)`, in at least float32."""
        grads, values = self.stacked(problem)
        return squared_norms(grads), values

    def weighted_sum(self, problem: Problem, weigh: Callable[[Tensor], Tensor]) -> tuple[Leaves, Tensor, Values]:
        """Return the weighted sum of the examples' gradients, the weights being a function of their norms.

        Args:
            problem: loss, parameters and batch.
            weigh: squared norms `(B,)` to weights `(B,)`. A row of weight zero contributes exactly zero,
                whatever its gradient is: also where that is not finite.

        Returns:
            The sum, for each parameter leaf one tensor of its shape in at least float32; the squared norms; the
            values.
        """
        grads, values = self.stacked(problem)
        squares = squared_norms(grads)
        weights = weigh(squares)
        bad = bad_rows(squares, weights)
        return [contract(weights, grad, bad) for grad in grads], squares, values


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over half-precision numbers are kept: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def squared_norms(grads: Leaves) -> Tensor:
    """Sum of squares of each row over all leaves: `(B, ...)` leaves to `(B,)`, in at least float32."""
    # By way of the norm, which needs no second array of the size of the first.
    norms = [
        torch.linalg.vector_norm(grad.reshape(grad.shape[0], -1), dim=1, dtype=accumulator(grad.dtype))
        for grad in grads
    ]
    return torch.stack(norms).square().sum(0)


def contract(weights: Tensor, grad: Tensor, bad: Tensor | None) -> Tensor:
    """Sum the rows of `grad` `(B, ...)` by `weights` `(B,)`, the rows marked in `bad` `(B,)` left out altogether."""
    dtype = accumulator(grad.dtype)
    rows = grad.reshape(grad.shape[0], -1).to(dtype)
    if bad is not None:
        rows = rows.masked_fill(bad[:, None], 0)
    return (weights.to(dtype) @ rows).reshape(grad.shape[1:])


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
