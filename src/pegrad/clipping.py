"""Clipping: from each example's gradient norm to its weight in the sum, and what that makes of the sensitivity."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pegrad.errors import ArgumentError

_LEAST, _GREATEST = 1e-9, 1e9


def check_positive(name: str, value: float) -> None:
    """Raise `ArgumentError` unless `value` is a finite number above zero."""
    if not 0 < value < float("inf"):
        raise ArgumentError(f"Expected {name} to be a finite number > 0, got {name}={value}")


def check_scale(name: str, value: float) -> None:
    """Raise `ArgumentError` unless `value` is a number that float32 gradients can be measured by."""
    if not _LEAST <= value <= _GREATEST:
        raise ArgumentError(
            f"Expected {name} to be between {_LEAST:g} and {_GREATEST:g}, got {name}={value}: beyond, float32 "
            "gradients vanish or overflow. Scale the loss instead"
        )


def clip_weights(squared_norms: Tensor, clip_norm: float, mask: Tensor | None = None) -> Tensor:
    """Weigh each example so that its gradient has norm at most `clip_norm`, and 0 where it has none to give.

    Args:
        squared_norms: `(B,)`, floating point. Rounding may have left them slightly below zero.
        clip_norm: the bound C, > 0.
        mask: `(B,)`, boolean; False marks padding. None: every row is an example.

    Returns:
        `(B,)`, in at least float32: `min(1, C / norm)`; 0 for padding and where the squared norm is not finite.

    Guarantee: `weight * norm <= C` for every row, up to floating-point rounding; a row that is NaN or infinite, or
    whose squared norm overflows, has weight 0. Bound to `test_clip_weights_bound_every_row`.

    Source: Abadi et al. 2016, Algorithm 1 (clip gradient).
    """
    squared_norms = squared_norms.to(torch.promote_types(squared_norms.dtype, torch.float32))
    norms = squared_norms.clamp(min=0).sqrt()
    weights = (norms / clip_norm).clamp(min=1).reciprocal()  # exactly 1 for what needs no clipping
    allowed = torch.isfinite(squared_norms)
    return weights.masked_fill(~(allowed if mask is None else allowed & mask), 0)


class Weighting(Protocol):
    """From norms to weights, and what an example can move a sum by that has those weights."""

    @property
    def clip_norm(self) -> float:
        """The norm below which nothing is clipped; 0 if there is no such."""

    @property
    def bound(self) -> float:
        """What the norm of one example's weighted gradient is at most; infinite if nothing bounds it."""

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """Weigh the examples, `(B,)`; zero for padding and where the squared norm is not finite."""


@dataclass(frozen=True)
class Flat:
    """One clip norm for the gradient over all leaves together, and a public constant to divide by.

    Raises:
        ArgumentError: a number is not between 1e-9 and 1e9.
    """

    clip_norm: float
    normalize_by: float = 1.0

    def __post_init__(self) -> None:
        check_scale("clip_norm", self.clip_norm)
        check_scale("normalize_by", self.normalize_by)

    @property
    def bound(self) -> float:
        """See `Weighting.bound`: `clip_norm / normalize_by`."""
        return self.clip_norm / self.normalize_by

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """Clip and normalise in one: dividing the sum itself would take a second copy of it."""
        return clip_weights(squared_norms, self.clip_norm, mask) / self.normalize_by


@dataclass(frozen=True)
class Unclipped:
    """Weight one for every example whose gradient is finite."""

    clip_norm = 0.0
    bound = float("inf")

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        weights = torch.isfinite(squared_norms).to(squared_norms.dtype)
        return weights if mask is None else weights.masked_fill(~mask, 0)
