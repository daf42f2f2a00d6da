"""From the norms of a clipping group's gradients to their weights, and the bound that no weight can pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from pegrad.assumptions import any_row
from pegrad.errors import ArgumentError
from pegrad.numerics import contract
from pegrad.torch_internals import transformed

Number = float | Tensor
"""A number; or a float64 scalar, where a step becomes a graph whose bounds are its state's."""


class Weighting(Protocol):
    """From the norms of a clipping group's gradients to their weights, and what a weighted one amounts to at most.

    A weight is at most `bound / max(norm, floor)`. What is larger is cut down to that: see `Weights.of`.
    """

    @property
    def floor(self) -> Number:
        """The norm up to which a weight is at most what it is there, `bound / floor`; 0 if there is no such.

        Norms are known up to a small part of it.
        """

    @property
    def bound(self) -> Number:
        """What the norm of one example's weighted gradient is at most; infinite if nothing bounds it."""

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """Weigh the examples, `(B,)`, each by its own squared norm alone."""


@dataclass(frozen=True)
class Over:
    """A weighting whose sum is divided by a public constant.

    In one with the weights: dividing the sum itself would take a second copy of it.
    """

    weighting: Weighting
    divisor: float

    @property
    def floor(self) -> Number:
        """See `Weighting.floor`."""
        return self.weighting.floor

    @property
    def bound(self) -> Number:
        """See `Weighting.bound`."""
        return self.weighting.bound / self.divisor

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return self.weighting.weights(squared_norms, mask) / self.divisor


@dataclass(frozen=True)
class Unclipped:
    """Weight one for every example whose gradient is finite."""

    floor = 0.0
    bound = float("inf")

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return torch.ones_like(squared_norms)


@dataclass(frozen=True)
class Weights:
    """The weights of one clipping group's gradients, example by example."""

    values: Tensor
    """`(B,)`"""
    bad: Tensor | None
    """`(B,)`, boolean: rows to leave out, as zero times what they hold might not be zero; None: no such row."""
    bound: Number
    """See `Weighting.bound`."""

    @classmethod
    def of(cls, weighting: Weighting, squares: Tensor, mask: Tensor | None) -> "Weights":
        """Weigh the examples by their squared norms `(B,)`, float64.

        Raises:
            ArgumentError: the weighting returns anything but one weight a row.

        Guarantee: whatever the weighting returns, a weight is at least 0 and at most `bound / max(norm, floor)`, and 0
        for padding, where the squared norm is not finite, and where the weighting returns NaN. A weight that is too
        large is cut down and raises no error, for that would tell of an example. Bound to
        `test_no_weight_is_above_what_the_bound_allows`.
        """
        values = weighting.weights(squares, mask)
        if not isinstance(values, Tensor) or values.shape != squares.shape or not values.is_floating_point():
            raise ArgumentError(
                f"Expected {type(weighting).__name__}.weights to return one floating-point weight for each squared "
                f"norm, a tensor of shape {tuple(squares.shape)}"
            )
        values = values.to(squares.dtype)
        if isinstance(weighting.bound, Tensor) or weighting.bound < inf:
            most = weighting.bound / squares.clamp(min=weighting.floor**2).sqrt()
            values = torch.where(values > most * _ROUNDING, most, values)
        allowed = torch.isfinite(squares) & (values >= 0)
        values = values.masked_fill(~(allowed if mask is None else allowed & mask), 0)
        finite = not transformed() and not any_row(~torch.isfinite(squares))
        return cls(values, None if finite else values == 0, weighting.bound)

    def __getitem__(self, rows: slice | Tensor) -> "Weights":
        """Take some examples' weights."""
        return Weights(self.values[rows], None if self.bad is None else self.bad[rows], self.bound)

    def contract(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum rows `(B, ...)` by weight, in that dtype or one as wide: see `pegrad.numerics.contract`."""
        return contract(self.values, rows, self.bad, dtype)

    def contract_pieces(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Sum rows by weight that lie in several tensors, one after the other, as `contract`."""
        start = len(pieces[0])
        total = self[:start].contract(pieces[0], dtype)
        for rows in pieces[1:]:
            total.add_(self[start : start + len(rows)].contract(rows, dtype))
            start += len(rows)
        return total


_ROUNDING = 1 + 1e-9  # so that a weight which is at its most by another formula stays as it is
