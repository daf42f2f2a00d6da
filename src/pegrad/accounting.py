"""What a run of DP-SGD costs: epsilon for a delta, over dp-accounting.

The event that is accounted comes from the sampler itself, so the batches that are drawn and the batches that are
paid for are the same. Neighbouring data sets differ by the addition or removal of one example. There is no other
choice, since dp-accounting 0.6.0 does not treat replacement alike in its two accountants.

dp-accounting is optional: `pip install "pegrad[accounting]"`. It is imported when a function here needs it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from pegrad.errors import ArgumentError, MissingExtraError
from pegrad.sampling import PoissonSampler, Sampler, ShuffledSampler

if TYPE_CHECKING:
    from dp_accounting import DpEvent

# A run that raises on overflow counts as Poisson sampling up to this probability that it does.
_NEGLIGIBLE = 1e-10

# Calibration searches this range of noise multipliers, to this relative precision.
_LEAST_SIGMA, _GREATEST_SIGMA = 2.0**-6, 2.0**20
_SIGMA_PRECISION = 1e-4


def dp_event(noise_multiplier: float, sampler: Sampler, steps: int) -> DpEvent:
    """Describe a run of DP-SGD as an event of dp-accounting.

    Guarantee:
        The event covers steps that each release a sum over the examples of the sampler's draw plus Gaussian noise
        of standard deviation σ times the sum's sensitivity to one example, and nothing else: neither the drawn
        rows nor their number. A sampler that raises on overflow is accounted as exact Poisson sampling; what that
        leaves out is stated by `PoissonSampler`, and refused unless negligible. Tests: `test_published_values`,
        `test_the_event_follows_the_sampler`, `test_truncation_is_charged`.

    Args:
        noise_multiplier: σ >= 0, the standard deviation of the noise over the sensitivity.
        sampler: how batches are drawn.
        steps: how many steps, at least 0.

    Returns:
        A `dp_accounting.DpEvent`. Runs in a row on one data set compose: `dp_accounting.ComposedDpEvent([...])`.

    Raises:
        ArgumentError: an argument is out of range, the sampler shuffles, or it raises on overflow and the run would
            overflow with a probability above 1e-10.
        MissingExtraError: dp-accounting is not installed.
    """
    if not 0 <= noise_multiplier < math.inf:
        raise ArgumentError(f"Expected finite noise_multiplier >= 0, got noise_multiplier={noise_multiplier}.")
    if not isinstance(steps, int) or steps < 0:
        raise ArgumentError(f"Expected steps to be an integer >= 0, got steps={steps!r}.")
    poisson = _check_sampler(sampler, steps)
    dp = _dp_accounting()
    if steps == 0:
        return dp.NoOpDpEvent()
    if noise_multiplier == 0:
        return dp.NonPrivateDpEvent()
    return dp.SelfComposedDpEvent(_step_event(dp, noise_multiplier, poisson), steps)


def epsilon(event: DpEvent, delta: float, accountant: Literal["pld", "rdp"] = "pld") -> float:
    """Compute the epsilon of an event at a delta, for adding or removing one example.

    Args:
        event: what `dp_event` returned, or any event that the accountant supports.
        delta: δ in (0, 1).
        accountant: "pld" composes privacy loss distributions, discretised so that rounding never lowers epsilon:
            tight. "rdp" composes Rényi divergences: a looser bound.

    Returns:
        ε >= 0; `math.inf` for a run without noise.

    Raises:
        ArgumentError: `delta` is out of range, or the accountant is unknown or does not support the event.
        MissingExtraError: dp-accounting is not installed.

    Source:
        PLD: Doroshenko et al., "Connect the dots: tighter discrete approximations of privacy loss distributions",
        2022. RDP: Mironov, Talwar and Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019.
        Truncated batches: arXiv 2508.15089.

    Example:
        >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.04)
        >>> round(epsilon(dp_event(1.5, sampler, steps=2250), delta=1e-5), 2)
        6.77
    """
    if not 0 < delta < 1:
        raise ArgumentError(f"Expected 0 < delta < 1, got delta={delta}.")
    if accountant not in ("pld", "rdp"):
        raise ArgumentError(f"Expected accountant 'pld' or 'rdp', got accountant={accountant!r}.")
    dp = _dp_accounting()
    try:
        return _pld_epsilon(dp, event, delta) if accountant == "pld" else _rdp_epsilon(dp, event, delta)
    except dp.UnsupportedEventError:
        raise ArgumentError(
            f"Accountant {accountant!r} does not support {event}. Truncated batches need 'pld'."
        ) from None


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


def _check_sampler(sampler: Sampler, steps: int) -> PoissonSampler:
    """Refuse a sampler whose draws are not what any supported event describes."""
    if isinstance(sampler, ShuffledSampler):
        raise ArgumentError(
            "Batches of ShuffledSampler are not Poisson samples, and accounting them as such understates "
            "epsilon. Train with PoissonSampler(num_examples, sampling_rate=batch_size / num_examples)."
        )
    if not isinstance(sampler, PoissonSampler):
        raise ArgumentError(f"Expected sampler to be a PoissonSampler, got {type(sampler).__name__}.")
    overflow = steps * sampler.overflow_probability
    if sampler.on_overflow == "error" and overflow > _NEGLIGIBLE:
        raise ArgumentError(
            f"With max_batch_size={sampler.rows}, {steps} steps may overflow with probability up to {overflow:.1e}, "
            "and a run that can fail is not exact Poisson sampling. Leave max_batch_size at its default, or "
            "set on_overflow='truncate'."
        )
    return sampler


def _step_event(dp: ModuleType, noise_multiplier: float, sampler: PoissonSampler) -> DpEvent:
    n, q = sampler.num_examples, sampler.sampling_rate
    if sampler.on_overflow == "truncate" and sampler.rows < n:
        return dp.TruncatedSubsampledGaussianDpEvent(n, q, sampler.rows, noise_multiplier)
    if q == 1:
        return dp.GaussianDpEvent(noise_multiplier)
    return dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(noise_multiplier))


def _pld_epsilon(dp: ModuleType, event: DpEvent, delta: float) -> float:
    """Epsilon by privacy loss distributions, their losses rounded up to multiples of an interval.

    The interval is refined until it is small beside epsilon. A fixed one would take minutes for a large epsilon and
    overstate a small one many times: rounding adds up over steps, and each step loses little.
    """
    interval = 1.0
    while True:
        accountant = dp.pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
        bound = float(accountant.compose(event).get_epsilon(delta))
        if bound == 0 or interval <= max(1e-4 * bound, 1e-5):
            return bound
        interval = max(5e-5 * bound, 1e-5)


def _rdp_epsilon(dp: ModuleType, event: DpEvent, delta: float) -> float:
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(event).get_epsilon(delta))


def _dp_accounting() -> ModuleType:
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise MissingExtraError(
            'Accounting needs dp-accounting, which is not installed: pip install "pegrad[accounting]".'
        ) from error
