"""The noise that a privacy budget allows."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Literal

from pegrad.accounting.cost import epsilon
from pegrad.accounting.samplers import dp_event
from pegrad.errors import ArgumentError
from pegrad.sampling import Sampler

# Calibration searches this range of noise multipliers, to this relative precision.
_LEAST_SIGMA, _GREATEST_SIGMA = 2.0**-6, 2.0**20
_SIGMA_PRECISION = 1e-4


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    sampler: Sampler,
    steps: int,
    accountant: Literal["pld", "rdp"] = "pld",
) -> float:
    """Find the noise multiplier that spends a privacy budget, and no more.

    Guarantee:
        `epsilon(dp_event(answer, sampler, steps), delta, accountant) <= target_epsilon`. Test:
        `test_calibration_never_overshoots_and_is_tight`.

    Args:
        target_epsilon: ε > 0.
        delta: δ in (0, 1).
        sampler: how batches will be drawn.
        steps: how many steps will be taken, at least 1.
        accountant: "pld" or "rdp", as for `epsilon`.

    Returns:
        σ, within 0.02% of the least that meets the budget; never below 1/64.

    Raises:
        ArgumentError: an argument is out of range, or even σ = 2^20 does not meet the budget.
        MissingExtraError: dp-accounting is not installed.

    Example:
        >>> from pegrad.sampling import PoissonSampler
        >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.04)
        >>> round(noise_multiplier_for(6.77, 1e-5, sampler, steps=2250), 2)
        1.5
    """
    if not 0 < target_epsilon < math.inf:
        raise ArgumentError(f"Expected finite target_epsilon > 0, got target_epsilon={target_epsilon}.")
    if steps == 0:
        raise ArgumentError("Expected steps >= 1, got steps=0: without steps there is nothing to calibrate.")

    @functools.cache
    def excess(sigma: float) -> float:
        return epsilon(dp_event(sigma, sampler, steps), delta, accountant) - target_epsilon

    return _least_root(excess)


def _least_root(excess: Callable[[float], float]) -> float:
    """The least σ, to `_SIGMA_PRECISION`, at which a decreasing function is not positive."""
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > _GREATEST_SIGMA:
            raise ArgumentError("No noise multiplier up to 2^20 meets target_epsilon: allow more, or use 'pld'.")
    while high > _LEAST_SIGMA and excess(high / 2) <= 0:
        high /= 2
    if high <= _LEAST_SIGMA:
        return high
    # scipy comes with dp-accounting.
    optimize = importlib.import_module("scipy.optimize")
    sigma = float(optimize.brentq(excess, high / 2, high, xtol=_SIGMA_PRECISION * high / 4))
    while excess(sigma) > 0:
        sigma *= 1 + _SIGMA_PRECISION
    return sigma
