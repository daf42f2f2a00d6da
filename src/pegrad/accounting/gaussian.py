"""The Gaussian mechanism of one step, under Poisson sampling, and what is asked of its numbers."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

from pegrad._validate import check_integer
from pegrad.errors import ArgumentError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

# Less noise is none: its square is no normal number, and epsilon would be one only in name.
LEAST_NOISE = 1e-100


def check_run(noise_multiplier: float, steps: int) -> None:
    """Check what a run's events are made of.

    Raises:
        ArgumentError: the noise multiplier is negative or not finite, or the number of steps is no integer >= 0.
    """
    if not 0 <= noise_multiplier < math.inf:
        raise ArgumentError(f"Expected finite noise_multiplier >= 0, got noise_multiplier={noise_multiplier}.")
    check_integer("steps", steps, 0)


def poisson(dp: ModuleType, sampling_rate: float, noise_multiplier: float) -> DpEvent:
    """Return the event of one step."""
    gaussian = dp.GaussianDpEvent(noise_multiplier)
    return gaussian if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, gaussian)
