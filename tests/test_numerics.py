"""Arithmetic of the guarantees, by itself."""

import pytest
import torch

from pegrad.numerics import norm_bounds, squared_norms


@pytest.mark.parametrize("size", [1e-45, 1e-30, 2e-23, 1.0, 1e15])
def test_norm_bounds_are_above_the_norms(size):
    """Catches: a bound of zero where the squares of all numbers vanish."""
    torch.manual_seed(0)
    rows = size * torch.randn(5, 3, 7)
    assert (norm_bounds(rows) >= rows.double().flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("number", [1 / 3, 0.1, 0.7, 0.9])
def test_equal_numbers_of_a_long_row(number):
    """Catches: long sums of float32, whose roundings all go one way where the numbers are equal."""
    rows = torch.full((1, 1_000_003), number)
    exact = rows.double().square().sum(1)
    torch.testing.assert_close(squared_norms(rows), exact, rtol=1e-6, atol=0)
    assert (norm_bounds(rows) >= exact.sqrt()).all()
