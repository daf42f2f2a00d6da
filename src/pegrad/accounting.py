"""What a run of DP-SGD costs: epsilon for a delta, over dp-accounting.

The event that is accounted comes from the sampler itself, so the batches that are drawn and the batches that are
paid for are the same. Neighbouring data sets differ by the addition or removal of one example, and the sampler runs on
both, with the number of examples of each. There is no other choice, since dp-accounting 0.6.0 does not treat
replacement alike in its two accountants.

An epsilon holds for those who see what the steps release. It does not hold for those who have the run's key or seed, or
know which examples were drawn.

dp-accounting is optional: `pip install "pegrad[accounting]"`. It is imported when a function here needs it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

from pegrad.accountants import pld_epsilon, rdp_epsilon
from pegrad.errors import ArgumentError, MissingExtraError
from pegrad.ledger import Ledger, checked
from pegrad.sampling import OVERFLOW_PROBABILITY, PoissonSampler, Sampler, ShuffledSampler, binomial_tail

if TYPE_CHECKING:
    from dp_accounting import DpEvent

# Less noise is none: its square is no normal number, and epsilon would be one only in name.
_LEAST_NOISE = 1e-100

# Calibration searches this range of noise multipliers, to this relative precision.
_LEAST_SIGMA, _GREATEST_SIGMA = 2.0**-6, 2.0**20
_SIGMA_PRECISION = 1e-4


class Event(NamedTuple):
    """What a run releases, in dp-accounting's terms. Made by `dp_event`.

    A data set has two kinds of neighbours, and what truncated batches cost depends on the size of the larger one of
    two. So there are two events; both must be paid for, and for Poisson batches they are the same.
    """

    removal: DpEvent
    """The run, against the same run on the data set without one of its examples."""
    addition: DpEvent
    """The run, against the same run on the data set with one example more."""
    overflow: float = 0.0
    """A bound on the probability that the run is not what the events describe, because a draw may not fit into the
    batch; it adds to δ."""


def dp_event(noise_multiplier: float, sampler: Sampler, steps: int) -> Event:
    """Describe a run of DP-SGD as events of dp-accounting.

    Guarantee:
        The events cover steps that each release a sum over the examples of the sampler's draw plus Gaussian noise
        of standard deviation σ times the sum's sensitivity to one example, and nothing else: neither the drawn
        rows nor their number. A sampler that raises on overflow is described as exact Poisson sampling, with a bound
        on the probability that the whole run is not that, which `epsilon` charges. Tests: `test_published_values`,
        `test_the_event_follows_the_sampler`, `test_truncation_is_charged_for_the_larger_neighbour`,
        `test_overflow_is_charged_for_the_run_and_the_larger_neighbour`.

    Args:
        noise_multiplier: σ >= 0, the standard deviation of the noise over the sensitivity.
        sampler: how batches are drawn.
        steps: how many steps, at least 0.

    Returns:
        An `Event`. Runs in a row on one data set are composed by `compose`.

    Raises:
        ArgumentError: an argument is out of range, or the sampler shuffles.
        MissingExtraError: dp-accounting is not installed.
    """
    if not 0 <= noise_multiplier < math.inf:
        raise ArgumentError(f"Expected finite noise_multiplier >= 0, got noise_multiplier={noise_multiplier}.")
    if not isinstance(steps, int) or steps < 0:
        raise ArgumentError(f"Expected steps to be an integer >= 0, got steps={steps!r}.")
    poisson = _check_sampler(sampler)
    dp = _dp_accounting()
    if steps == 0:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent())
    if noise_multiplier < _LEAST_NOISE:
        return Event(dp.NonPrivateDpEvent(), dp.NonPrivateDpEvent())
    n, q = poisson.num_examples, poisson.sampling_rate
    overflow = max(_overflow(poisson, others) for others in (n - 1, n))
    if poisson.on_overflow == "truncate" and poisson.max_batch_size and overflow > OVERFLOW_PROBABILITY:
        pairs = [dp.TruncatedSubsampledGaussianDpEvent(n + more, q, poisson.rows, noise_multiplier) for more in (0, 1)]
        overflow = 0.0
    else:
        pairs = [_poisson(dp, q, noise_multiplier)] * 2
    removal, addition = (dp.SelfComposedDpEvent(event, steps) for event in pairs)
    return Event(removal, addition, min(1.0, steps * overflow))


def _overflow(sampler: PoissonSampler, others: int) -> float:
    """Bound what overflow adds to the delta of one step, between data sets of `others` examples and one more, z.

    Let S be the draw of the others, which is the same on both data sets. Where S leaves a row free, the batch is the
    exact Poisson sample, with z or without, and the step is as private as Poisson sampling makes it, for every such S.
    Where S fills all M rows or more, an error or a truncation may tell whether z is there, and delta is at most 1. How
    many others are drawn depends neither on z nor on what earlier steps released, so by joint convexity the delta of a
    run is at most that of the Poisson run plus the probability that S fills the batch in some step: T times
    P[Binomial(others, q) >= M]. No exp(ε) enters, as it would if the overflow of each data set were charged by itself.
    """
    rows = replace(sampler, num_examples=others + 1).rows  # by default the larger data set has the larger batch
    return binomial_tail(others, sampler.sampling_rate, rows - 1)


def compose(*events: Event) -> Event:
    """Describe several runs in a row on one data set as one.

    >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.04)
    >>> warm_up, training = dp_event(2.0, sampler, steps=50), dp_event(1.5, sampler, steps=2250)
    >>> epsilon(compose(warm_up, training), delta=1e-5) > epsilon(training, delta=1e-5)
    True
    """
    dp = _dp_accounting()
    if not events:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent())
    removals, additions, overflows = zip(*events, strict=True)
    return Event(
        dp.ComposedDpEvent(list(removals)), dp.ComposedDpEvent(list(additions)), min(1.0, math.fsum(overflows))
    )


def ledger_event(ledger: Ledger) -> Event:
    """Describe what a ledger lists as events of dp-accounting.

    Guarantee:
        Every step that the ledger lists is charged with the noise multiplier and the sampler it was taken with; with
        adaptive clipping, gradients and counts as the one Gaussian mechanism that they are together. Tests:
        `test_the_ledger_pays_for_every_step`, `test_adaptive_steps_cost_what_dp_accounting_composes`.

    Args:
        ledger: of a state that `pegrad.dp_sgd` made, for runs on one data set.

    Raises:
        ArgumentError: an entry does not say how its batches were drawn, or was changed.
        MissingExtraError: dp-accounting is not installed.
    """
    entries = checked(ledger)
    return compose(*(dp_event(entry.joint_noise_multiplier, sampler, entry.steps) for entry, sampler in entries))


def epsilon(event: Event | Ledger | DpEvent | None, delta: float, accountant: Literal["pld", "rdp"] = "pld") -> float:
    """Compute the epsilon of an event at a delta, for adding or removing one example.

    Args:
        event: what `dp_event` or `compose` returned, the ledger of a state, or any event of dp-accounting that the
            accountant supports.
        delta: δ in (0, 1).
        accountant: "pld" composes privacy loss distributions, discretised so that rounding never lowers epsilon, and
            Rényi divergences too, and takes the smaller of the two bounds. "rdp" composes Rényi divergences alone: a
            looser bound.

    Returns:
        ε >= 0; `math.inf` for a run without noise.

    Raises:
        ArgumentError: `delta` is out of range, the accountant is unknown or does not support the event, batches
            overflow with a probability that is not below `delta`, or a ledger does not say all that is needed.
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
    if event is None:
        raise ArgumentError(
            "Expected an event or a ledger, got None: a state without a ledger does not say what was released before."
        )
    dp = _dp_accounting()
    event = ledger_event(event) if isinstance(event, Ledger) else event
    removal, addition, overflow = event if isinstance(event, Event) else Event(event, event)
    if overflow >= delta:
        raise ArgumentError(
            f"The batches of this run are not the Poisson samples that are accounted with probability up to "
            f"{overflow:.1e}, since a draw may overflow, and that is not below delta={delta:g}. Leave max_batch_size "
            "at its default, raise it, or set on_overflow='truncate'."
        )
    bound = pld_epsilon if accountant == "pld" else rdp_epsilon
    pairs = [removal] if removal == addition else [removal, addition]
    try:
        return max(bound(dp, pair, delta - overflow) for pair in pairs)
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


def _check_sampler(sampler: Sampler) -> PoissonSampler:
    """Refuse a sampler whose draws are not what any supported event describes."""
    if isinstance(sampler, ShuffledSampler):
        raise ArgumentError(
            "Batches of ShuffledSampler are not Poisson samples, and accounting them as such understates "
            "epsilon. Train with PoissonSampler(num_examples, sampling_rate=batch_size / num_examples)."
        )
    if not isinstance(sampler, PoissonSampler):
        raise ArgumentError(f"Expected sampler to be a PoissonSampler, got {type(sampler).__name__}.")
    return sampler


def _poisson(dp: ModuleType, sampling_rate: float, noise_multiplier: float) -> DpEvent:
    gaussian = dp.GaussianDpEvent(noise_multiplier)
    return gaussian if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, gaussian)


def _dp_accounting() -> ModuleType:
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise MissingExtraError(
            'Accounting needs dp-accounting, which is not installed: pip install "pegrad[accounting]".'
        ) from error
