"""Which events a run is that draws records, where what is protected is a user with several."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

from pegrad._validate import check_integer
from pegrad.accounting.events import Event, repeated
from pegrad.accounting.extra import dp_accounting
from pegrad.accounting.gaussian import LEAST_NOISE, check_run, poisson
from pegrad.accounting.overflow import overflow_probability
from pegrad.errors import ArgumentError
from pegrad.sampling import PoissonSampler

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def user_event(noise_multiplier: float, sampler: PoissonSampler, steps: int, max_records: int) -> Event:
    """Describe a run that draws records, where what is protected is a user with all of up to k records.

    Each of a user's k records is drawn by a toss of its own, so Binomial(k, q) of them are in a batch, and the sum
    moves by that many times the sensitivity at most: a mixture of Gaussians. At the same noise epsilon is far larger
    than for one record; where users have many, draw users instead (`pegrad.sampling.UserSampler`).

    Guarantee:
        The event covers neighbours that differ by the addition or removal of one user who owns at most k records. With
        k = 1 it is that of `dp_event`. Tests: `test_a_users_records_are_a_mixture`,
        `test_no_user_costs_more_than_is_charged`.

    Args:
        noise_multiplier: σ >= 0, the standard deviation of the noise over the sensitivity to one record.
        sampler: how records are drawn. That a draw may not fit is charged for, truncated or not, as `Event.overflow`.
        steps: how many steps, at least 0.
        max_records: k, at least 1. That no user owns more is up to you: the event cannot see it.

    Returns:
        An `Event`; for "pld" alone.

    Raises:
        ArgumentError: an argument is out of range, or the sampler is one for which there is no sound accountant.
        MissingExtraError: dp-accounting is not installed.

    Source:
        Ganesh, "Tight group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms", 2024;
        Choquette-Choo et al., "Privacy amplification for matrix mechanisms", 2023, Corollary 4.7.

    Example:
        >>> from pegrad.accounting import epsilon
        >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.01)
        >>> round(epsilon(user_event(1.5, sampler, steps=100, max_records=3), delta=1e-5), 1)
        1.0
    """
    check_run(noise_multiplier, steps)
    check_integer("max_records", max_records, 1)
    if not isinstance(sampler, PoissonSampler):
        raise ArgumentError(
            f"Expected a PoissonSampler of records, got {type(sampler).__name__}: no accountant covers users whose "
            "records are drawn in another way. Draw users, by UserSampler and dp_event."
        )
    dp, k = dp_accounting(), max_records
    if steps == 0:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent())
    if noise_multiplier < LEAST_NOISE:
        return Event(dp.NonPrivateDpEvent(), dp.NonPrivateDpEvent())
    n, q = sampler.num_examples, sampler.sampling_rate
    overflow = max(overflow_probability(sampler, others, more) for others, more in ((max(0, n - k), min(k, n)), (n, k)))
    return repeated(dp, [_mixture(dp, q, noise_multiplier, k)] * 2, steps, steps * overflow)


def _mixture(dp: ModuleType, sampling_rate: float, noise_multiplier: float, records: int) -> DpEvent:
    """The sum moved by Binomial(records, sampling_rate) sensitivities."""
    if records == 1 or sampling_rate == 1:
        return poisson(dp, sampling_rate, noise_multiplier / records)
    counts = range(records + 1)
    logs = [
        math.lgamma(records + 1) - math.lgamma(j + 1) - math.lgamma(records - j + 1)
        + j * math.log(sampling_rate) + (records - j) * math.log1p(-sampling_rate)
        for j in counts
    ]  # fmt: skip
    probabilities = [math.exp(log) for log in logs]
    return dp.dp_event.MixtureOfGaussiansDpEvent(noise_multiplier, [float(j) for j in counts], probabilities)
