"""Which events a run of DP-SGD is, by the sampler that draws its batches."""

import math

from pegrad.accounting.accountants import Relation
from pegrad.accounting.balls_in_bins import BallsInBinsEvent
from pegrad.accounting.events import Event, repeated
from pegrad.accounting.extra import dp_accounting
from pegrad.accounting.gaussian import LEAST_NOISE, check_run, poisson
from pegrad.accounting.overflow import overflow_probability
from pegrad.errors import ArgumentError
from pegrad.sampling import (
    OVERFLOW_PROBABILITY,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    RecordSampler,
    Sampler,
    ShuffledSampler,
    UserSampler,
)


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
    check_run(noise_multiplier, steps)
    sampler = _check_sampler(sampler)
    dp = dp_accounting()
    relation: Relation = "replace" if isinstance(sampler, FixedSizeSampler) else "add_or_remove"
    if isinstance(sampler, BallsInBinsSampler) and steps % sampler.steps_per_epoch:
        raise ArgumentError(
            f"Expected whole epochs of {sampler.steps_per_epoch} steps for BallsInBinsSampler, got steps={steps}: an "
            "example's place in an epoch is one secret. Round up if the run ends there, and change the noise only "
            "between epochs."
        )
    if steps == 0:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent(), relation=relation)
    if noise_multiplier < LEAST_NOISE:
        return Event(dp.NonPrivateDpEvent(), dp.NonPrivateDpEvent(), relation=relation)
    n = sampler.num_examples
    if isinstance(sampler, FixedSizeSampler):
        # dp-accounting's noise multiplier is over the distance that a replacement moves the sum, which is 2C.
        gaussian = dp.GaussianDpEvent(noise_multiplier / 2)
        subset = dp.SampledWithoutReplacementDpEvent(n, sampler.batch_size, gaussian)
        return repeated(dp, [subset, subset], steps, relation=relation)
    overflow = max(overflow_probability(sampler, others) for others in (n - 1, n))
    if isinstance(sampler, BallsInBinsSampler):
        epoch = BallsInBinsEvent(noise_multiplier, sampler.steps_per_epoch)
        return repeated(dp, [epoch, epoch], steps // sampler.steps_per_epoch, steps * overflow)
    if isinstance(sampler, CyclicPoissonSampler):
        turn = poisson(dp, sampler.sampling_rate, noise_multiplier)
        return repeated(dp, [turn, turn], math.ceil(steps / sampler.num_blocks), steps * overflow)
    q = sampler.sampling_rate
    if sampler.on_overflow == "truncate" and sampler.max_batch_size and overflow > OVERFLOW_PROBABILITY:
        pairs = [dp.TruncatedSubsampledGaussianDpEvent(n + more, q, sampler.rows, noise_multiplier) for more in (0, 1)]
        return repeated(dp, pairs, steps)
    return repeated(dp, [poisson(dp, q, noise_multiplier)] * 2, steps, steps * overflow)


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
