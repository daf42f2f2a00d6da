"""Arithmetic of the guarantees, by itself."""

import pytest
import torch

from pegrad.numerics import norm_bounds


@pytest.mark.parametrize("size", [1e-45, 1e-30, 2e-23, 1.0, 1e15])
def test_norm_bounds_are_above_the_norms(size):
    """Catches: a bound of zero where the squares of all numbers vanish."""
    torch.manual_seed(0)
    rows = size * torch.randn(5, 3, 7)
    assert (norm_bounds(rows) >= rows.double().flatten(1).norm(dim=1)).all()
