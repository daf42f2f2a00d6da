"""What a strategy is asked about, and what any answer comes with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.numerics import accumulator

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
    def examples(self) -> int | Tensor:
        """Number of rows that are no padding; with a mask, a float64 scalar."""
        return self.batch_size if self.mask is None else self.mask.sum(dtype=torch.float64)

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
