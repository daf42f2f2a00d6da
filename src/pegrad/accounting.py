"""What a run of DP-SGD costs: epsilon for a delta, over dp-accounting.

The event that is accounted comes from the sampler itself, so the batches that are drawn and the batches that are
paid for are the same. Which data sets are neighbours follows from the sampler too. Where the number of examples in a
batch is random, they differ by the addition or removal of one example, and the sampler runs on both, with the number of
examples of each. Where it is fixed, they differ by the replacement of one. `docs/sampling.md` has the table.

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

from pegrad._validate import check_integer
from pegrad.accountants import Relation, pld_epsilon, rdp_epsilon
from pegrad.balls_in_bins import BallsInBinsEvent
from pegrad.errors import ArgumentError, MissingExtraError
from pegrad.ledger import Ledger, checked
from pegrad.sampling import (
    OVERFLOW_PROBABILITY,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    RecordSampler,
    Sampler,
    ShuffledSampler,
    UserSampler,
    binomial_tail,
)

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
    two. So there are two events; both must be paid for, and for Poisson batches they are the same. Under replacement
    there is one kind, and they are the same.
    """

    removal: DpEvent
    """The run, against the same run on the data set without one of its examples."""
    addition: DpEvent
    """The run, against the same run on the data set with one example more."""
    overflow: float = 0.0
    """A bound on the probability that the run is not what the events describe, because a draw may not fit into the
    batch; it adds to δ."""
    relation: Relation = "add_or_remove"
    """How neighbouring data sets differ: by the addition or removal of one example (or user), or by the replacement of
    one."""


def dp_event(noise_multiplier: float, sampler: Sampler, steps: int) -> Event:
    """Describe a run of DP-SGD as events of dp-accounting.

    Guarantee:
        The events cover steps that each release a sum over the examples of the sampler's draw plus Gaussian noise
        of standard deviation σ times the sum's sensitivity to one example, and nothing else: neither the drawn
        rows nor their number. A sampler that raises on overflow is described as if all draws fitted, with a bound
        on the probability that the whole run is not that, which `epsilon` charges. Tests: `test_published_values`,
        `test_the_event_follows_the_sampler`, `test_truncation_is_charged_for_the_larger_neighbour`,
        `test_overflow_is_charged_for_the_run_and_the_larger_neighbour`, `test_no_step_costs_more_than_is_charged`,
        `test_other_samplers_have_their_events`, `test_fixed_size_is_charged_twice_the_sensitivity`.

    Truncated batches: what they cost depends on the number of examples, which differs between neighbours. dp-accounting
    would have it fixed, by the relation that replaces an example by a special one that contributes zero. That is not
    needed here, and would protect less: its event with parameter n compares any n examples with the n - 1 that are left
    without one of them, so `removal` has n, `addition` has n + 1, and the larger is paid.

    Args:
        noise_multiplier: σ >= 0, the standard deviation of the noise over the sensitivity to one example's addition or
            removal, which is the clip norm; for `FixedSizeSampler` too.
        sampler: how batches are drawn. For a `UserSampler` the event counts users.
        steps: how many steps, at least 0, from the first of a run or after runs that were accounted for before. For
            `BallsInBinsSampler` whole epochs: a part of one costs what it costs whole.

    Returns:
        An `Event`. Runs in a row on one data set are composed by `compose`.

    Raises:
        ArgumentError: an argument is out of range, the sampler shuffles, or a part of an epoch is asked for.
        MissingExtraError: dp-accounting is not installed.
    """
    _check_run(noise_multiplier, steps)
    sampler = _check_sampler(sampler)
    dp = _dp_accounting()
    relation: Relation = "replace" if isinstance(sampler, FixedSizeSampler) else "add_or_remove"
    if isinstance(sampler, BallsInBinsSampler) and steps % sampler.steps_per_epoch:
        raise ArgumentError(
            f"Expected whole epochs of {sampler.steps_per_epoch} steps for BallsInBinsSampler, got steps={steps}: an "
            "example's place in an epoch is one secret. Round up if the run ends there, and change the noise only "
            "between epochs."
        )
    if steps == 0:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent(), relation=relation)
    if noise_multiplier < _LEAST_NOISE:
        return Event(dp.NonPrivateDpEvent(), dp.NonPrivateDpEvent(), relation=relation)
    n = sampler.num_examples
    if isinstance(sampler, FixedSizeSampler):
        # dp-accounting's noise multiplier is over the distance that a replacement moves the sum, which is 2C.
        gaussian = dp.GaussianDpEvent(noise_multiplier / 2)
        subset = dp.SampledWithoutReplacementDpEvent(n, sampler.batch_size, gaussian)
        return _repeated(dp, [subset, subset], steps, relation=relation)
    overflow = max(_overflow(sampler, others) for others in (n - 1, n))
    if isinstance(sampler, BallsInBinsSampler):
        epoch = BallsInBinsEvent(noise_multiplier, sampler.steps_per_epoch)
        return _repeated(dp, [epoch, epoch], steps // sampler.steps_per_epoch, steps * overflow)
    if isinstance(sampler, CyclicPoissonSampler):
        turn = _poisson(dp, sampler.sampling_rate, noise_multiplier)
        return _repeated(dp, [turn, turn], math.ceil(steps / sampler.num_blocks), steps * overflow)
    q = sampler.sampling_rate
    if sampler.on_overflow == "truncate" and sampler.max_batch_size and overflow > OVERFLOW_PROBABILITY:
        pairs = [dp.TruncatedSubsampledGaussianDpEvent(n + more, q, sampler.rows, noise_multiplier) for more in (0, 1)]
        return _repeated(dp, pairs, steps)
    return _repeated(dp, [_poisson(dp, q, noise_multiplier)] * 2, steps, steps * overflow)


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
        >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.01)
        >>> round(epsilon(user_event(1.5, sampler, steps=100, max_records=3), delta=1e-5), 1)
        1.0
    """
    _check_run(noise_multiplier, steps)
    check_integer("max_records", max_records, 1)
    if not isinstance(sampler, PoissonSampler):
        raise ArgumentError(
            f"Expected a PoissonSampler of records, got {type(sampler).__name__}: no accountant covers users whose "
            "records are drawn in another way. Draw users, by UserSampler and dp_event."
        )
    dp, k = _dp_accounting(), max_records
    if steps == 0:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent())
    if noise_multiplier < _LEAST_NOISE:
        return Event(dp.NonPrivateDpEvent(), dp.NonPrivateDpEvent())
    n, q = sampler.num_examples, sampler.sampling_rate
    overflow = max(_overflow(sampler, others, more) for others, more in ((max(0, n - k), min(k, n)), (n, k)))
    return _repeated(dp, [_mixture(dp, q, noise_multiplier, k)] * 2, steps, steps * overflow)


def _mixture(dp: ModuleType, sampling_rate: float, noise_multiplier: float, records: int) -> DpEvent:
    """The sum moved by Binomial(records, sampling_rate) sensitivities."""
    if records == 1 or sampling_rate == 1:
        return _poisson(dp, sampling_rate, noise_multiplier / records)
    counts = range(records + 1)
    logs = [
        math.lgamma(records + 1) - math.lgamma(j + 1) - math.lgamma(records - j + 1)
        + j * math.log(sampling_rate) + (records - j) * math.log1p(-sampling_rate)
        for j in counts
    ]  # fmt: skip
    probabilities = [math.exp(log) for log in logs]
    return dp.dp_event.MixtureOfGaussiansDpEvent(noise_multiplier, [float(j) for j in counts], probabilities)


def _repeated(
    dp: ModuleType, pairs: list, count: int, overflow: float = 0.0, relation: Relation = "add_or_remove"
) -> Event:
    removal, addition = (dp.SelfComposedDpEvent(event, count) for event in pairs)
    return Event(removal, addition, min(1.0, overflow), relation)


def _overflow(sampler: PoissonSampler | CyclicPoissonSampler | BallsInBinsSampler, others: int, more: int = 1) -> float:
    """Bound what overflow adds to the delta of one step, between data sets of `others` examples and `more`, z.

    Let S be the draw of the others, which is the same on both data sets. Where S leaves a row free for each of z, the
    batch is the exact sample, with z or without, and the step is as private as exact sampling makes it, for every such
    S. Where S leaves less, an error or a truncation may tell whether z is there, and delta is at most 1. How many
    others are drawn depends neither on z nor on what earlier steps released, so by joint convexity the delta of a run
    is at most that of the exact run plus the probability that S leaves less in some step: T times P[Binomial(others,
    rate) > M - more]. No exp(ε) enters, as it would if the overflow of each data set were charged by itself. That steps
    may depend on each other, as those of an epoch dealt to bins do, takes nothing from the sum over them.
    """
    rows = replace(sampler, num_examples=others + more).rows  # by default the larger data set has the larger batch
    return binomial_tail(others, sampler.inclusion_rate, rows - more)


def compose(*events: Event) -> Event:
    """Describe several runs in a row on one data set as one.

    Raises:
        ArgumentError: some events are for the addition or removal of an example, some for the replacement of one.

    >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.04)
    >>> warm_up, training = dp_event(2.0, sampler, steps=50), dp_event(1.5, sampler, steps=2250)
    >>> epsilon(compose(warm_up, training), delta=1e-5) > epsilon(training, delta=1e-5)
    True
    """
    dp = _dp_accounting()
    if not events:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent())
    removals, additions, overflows, relations = zip(*events, strict=True)
    if len(set(relations)) > 1:
        raise ArgumentError(
            "Expected events of one relation, got some for the addition or removal of an example and some, of "
            "FixedSizeSampler, for the replacement of one: no epsilon covers both."
        )
    return Event(
        dp.ComposedDpEvent(list(removals)),
        dp.ComposedDpEvent(list(additions)),
        min(1.0, math.fsum(overflows)),
        relations[0],
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
    """Compute the epsilon of an event at a delta, for its relation between neighbouring data sets.

    Args:
        event: what `dp_event` or `compose` returned, the ledger of a state, or any event of dp-accounting that the
            accountant supports.
        delta: δ in (0, 1).
        accountant: "pld" composes privacy loss distributions, discretised so that rounding never lowers epsilon, and
            Rényi divergences too, and takes the smaller of the two bounds; of subsets of a fixed size and balls-in-bins
            only the latter is known. "rdp" composes Rényi divergences alone: a looser bound.

    Returns:
        ε >= 0; `math.inf` for a run without noise.

    Raises:
        ArgumentError: `delta` is out of range, the accountant is unknown or does not support the event, batches
            overflow with a probability that is not below `delta`, or a ledger does not say all that is needed.
        MissingExtraError: dp-accounting is not installed.

    Source:
        PLD: Doroshenko et al., "Connect the dots: tighter discrete approximations of privacy loss distributions",
        2022. RDP: Mironov, Talwar and Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019.
        Truncated batches: arXiv 2508.15089. Subsets of a fixed size: Wang, Balle and Kasiviswanathan, "Subsampled Rényi
        differential privacy and analytical moments accountant", 2019, Theorem 27. Balls-in-bins:
        `pegrad.balls_in_bins`.

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
    removal, addition, overflow, relation = event if isinstance(event, Event) else Event(event, event)
    if overflow >= delta:
        raise ArgumentError(
            f"The batches of this run are not the Poisson samples that are accounted with probability up to "
            f"{overflow:.1e}, since a draw may overflow, and that is not below delta={delta:g}. Leave max_batch_size "
            "at its default, raise it, or set on_overflow='truncate'."
        )
    bound = pld_epsilon if accountant == "pld" else rdp_epsilon
    pairs = [removal] if removal == addition else [removal, addition]
    try:
        return max(bound(dp, pair, delta - overflow, relation) for pair in pairs)
    except dp.UnsupportedEventError:
        raise ArgumentError(
            f"Accountant {accountant!r} does not support {event}. Truncated batches and users' records need 'pld'."
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


def _check_run(noise_multiplier: float, steps: int) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise ArgumentError(f"Expected finite noise_multiplier >= 0, got noise_multiplier={noise_multiplier}.")
    check_integer("steps", steps, 0)


def _check_sampler(sampler: Sampler) -> RecordSampler:
    """Refuse a sampler whose draws are not what any supported event describes; of users, return how they are drawn."""
    if isinstance(sampler, ShuffledSampler):
        raise ArgumentError(
            "Batches of ShuffledSampler are not Poisson samples, and accounting them as such understates "
            "epsilon. Train with PoissonSampler(num_examples, sampling_rate=batch_size / num_examples)."
        )
    drawn = sampler.sampler if isinstance(sampler, UserSampler) else sampler
    if not isinstance(drawn, RecordSampler):
        raise ArgumentError(
            f"Expected sampler to be one of pegrad.sampling, such as PoissonSampler, got {type(sampler).__name__}."
        )
    return drawn


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
