"""Clipping: from each example's gradient norm to its weight in the sum, and what that makes of the sensitivity."""

import torch
from torch import Tensor

from pegrad.errors import ArgumentError


def check_positive(name: str, value: float) -> None:
    """Raise `ArgumentError` unless `value` is a finite number above zero."""
    if not 0 < value < float("inf"):
        raise ArgumentError(f"Expected {name} to be a finite number > 0, got {name}={value}")


def clip_weights(squared_norms: Tensor, clip_norm: float, mask: Tensor | None = None) -> Tensor:
    """Weigh each example so that its gradient has norm at most `clip_norm`, and 0 where it has none to give.

    Args:
        squared_norms: `(B,)`, floating point. Rounding may have left them slightly below zero.
        clip_norm: the bound C, > 0.
        mask: `(B,)`, boolean; False marks padding. None: every row is an example.

    Returns:
        `(B,)`: `min(1, C / norm)`; 0 for padding and where the squared norm is not finite.

    Guarantee: `weight * norm <= C` for every row, up to floating-point rounding; a row that is NaN or infinite, or
    whose squared norm overflows, has weight 0. Bound to `test_clip_weights_bound_every_row`.

    Source: Abadi et al. 2016, Algorithm 1 (clip gradient).
    """
    norms = squared_norms.clamp(min=0).sqrt()
    weights = (norms / clip_norm).clamp(min=1).reciprocal()  # exactly 1 for what needs no clipping
    allowed = torch.isfinite(squared_norms)
    return weights.masked_fill(~(allowed if mask is None else allowed & mask), 0)
