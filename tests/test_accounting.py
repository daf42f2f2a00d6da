"""Epsilon against published values, against closed forms, and against itself."""

import math
import sys

import dp_accounting
import pytest
from scipy import optimize, stats

from pegrad.accounting import dp_event, epsilon, noise_multiplier_for
from pegrad.errors import ArgumentError, MissingExtraError
from pegrad.sampling import PoissonSampler, ShuffledSampler


def _epsilon(sigma, rate, steps, delta, accountant="pld", num_examples=1000):
    return epsilon(dp_event(sigma, PoissonSampler(num_examples, rate), steps), delta, accountant)


def _one_step_epsilon(sigma, rate, delta):
    """Closed form for one step: the least ε at which adding and removing an example both stay below δ."""

    def remove(eps):  # (1-q)·N(0, σ²) + q·N(1, σ²) against N(0, σ²), over outputs above the threshold
        level = math.exp(eps)
        cut = sigma**2 * math.log((level - (1 - rate)) / rate) + 0.5
        return rate * stats.norm.sf((cut - 1) / sigma) - (level - (1 - rate)) * stats.norm.sf(cut / sigma)

    def add(eps):  # the other way around, over outputs below the threshold
        level = math.exp(-eps)
        if level <= 1 - rate:
            return 0.0
        cut = sigma**2 * math.log((level - (1 - rate)) / rate) + 0.5
        mixture = (1 - rate) * stats.norm.cdf(cut / sigma) + rate * stats.norm.cdf((cut - 1) / sigma)
        return stats.norm.cdf(cut / sigma) - mixture / level

    return optimize.brentq(lambda eps: max(remove(eps), add(eps)) - delta, 1e-9, 100, xtol=1e-12)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "accountant", "published"),
    [
        (1.5, 0.04, 2250, 1e-5, "pld", 6.7688),
        (1.5, 0.04, 2250, 1e-5, "rdp", 7.3293),
        (0.8, 0.05, 100, 1e-6, "pld", 6.7306),
        (0.8, 0.05, 100, 1e-6, "rdp", 7.6656),
        (3.0, 0.1, 512, 1e-6, "pld", 3.7697),
        (1.0, 1.0, 1, 1e-5, "pld", 4.377178),
    ],
)
def test_published_values(sigma, rate, steps, delta, accountant, published):
    """Catches a wrong event, relation, accountant or discretisation: to 1e-4, and 1e-6 relative where known."""
    tolerance = 1e-6 if published == 4.377178 else 1e-4
    assert _epsilon(sigma, rate, steps, delta, accountant) == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 1.0), (0.5, 0.3), (2.0, 0.5), (0.8, 0.2)])
def test_one_step_has_the_closed_form(sigma, rate):
    """Catches a sampling rate or a noise multiplier that is squared, halved or lost."""
    assert _epsilon(sigma, rate, 1, 1e-5) == pytest.approx(_one_step_epsilon(sigma, rate, 1e-5), rel=1e-4)


def test_full_batches_compose_as_one_gaussian():
    """Catches steps that are lost: T Gaussian steps are one of σ/sqrt(T)."""
    assert _epsilon(20.0, 1.0, 100, 1e-5) == pytest.approx(_one_step_epsilon(2.0, 1.0, 1e-5), rel=1e-4)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.001, 100_000), (0.02, 1000), (1.0, 10)])
def test_pld_is_at_most_rdp(sigma, rate, steps):
    """Catches a fixed discretisation, which overstates small epsilons beyond the slack of Rényi composition."""
    assert _epsilon(sigma, rate, steps, 1e-5, "pld") <= _epsilon(sigma, rate, steps, 1e-5, "rdp")


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_monotone(accountant):
    """Catches arguments that are swapped."""
    base = _epsilon(3.0, 0.1, 200, 1e-5, accountant)
    assert _epsilon(3.0, 0.1, 210, 1e-5, accountant) > base
    assert _epsilon(3.1, 0.1, 200, 1e-5, accountant) < base
    assert _epsilon(3.0, 0.11, 200, 1e-5, accountant) > base
    assert _epsilon(3.0, 0.1, 200, 1.1e-5, accountant) < base


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_no_noise_and_no_steps(accountant):
    assert _epsilon(0.0, 0.1, 1, 1e-5, accountant) == math.inf
    assert _epsilon(1.0, 0.1, 0, 1e-5, accountant) == 0
    assert _epsilon(0.0, 0.1, 0, 1e-5, accountant) == 0


def test_large_epsilon_is_quick():
    """Catches a fixed discretisation, which would take minutes here. The loss of T steps is about T/(2σ²)."""
    assert 2000 < _epsilon(0.1, 1.0, 40, 1e-5) < 2600


# The event


def test_the_event_follows_the_sampler():
    gaussian = dp_accounting.GaussianDpEvent(1.5)
    sampled = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 1.5)
    for sampler, event in (
        (PoissonSampler(100, 0.1), sampled),
        (PoissonSampler(100, 1.0), gaussian),
        (PoissonSampler(100, 0.1, 20, "truncate"), truncated),
        (PoissonSampler(100, 0.1, 100, "truncate"), sampled),
        (PoissonSampler(100, 1.0, 100, "truncate"), gaussian),
    ):
        assert dp_event(1.5, sampler, 7) == dp_accounting.SelfComposedDpEvent(event, 7)


def test_truncation_is_charged():
    """Catches truncated batches accounted as plain ones; with nothing to truncate the two agree."""
    plain = _epsilon(4.0, 0.2, 50, 1e-5, num_examples=1000)
    often, rarely = PoissonSampler(1000, 0.2, 205, "truncate"), PoissonSampler(1000, 0.2, 400, "truncate")
    assert epsilon(dp_event(4.0, often, 50), 1e-5) > 1.2 * plain
    assert epsilon(dp_event(4.0, rarely, 50), 1e-5) == pytest.approx(plain, rel=1e-4)


def test_truncation_is_not_for_rdp():
    event = dp_event(2.0, PoissonSampler(1000, 0.1, 105, "truncate"), 50)
    with pytest.raises(ArgumentError, match=r"'rdp' does not support.*Truncated batches need 'pld'"):
        epsilon(event, 1e-5, "rdp")


def test_likely_overflow_is_refused():
    """Catches a run that can fail accounted as one that cannot."""
    with pytest.raises(ArgumentError, match=r"max_batch_size=130, 50 steps may overflow.*on_overflow='truncate'"):
        dp_event(2.0, PoissonSampler(1000, 0.1, 130), 50)
    for sampler in (PoissonSampler(1000, 0.1), PoissonSampler(1000, 0.1, 1000)):
        dp_event(2.0, sampler, 1_000_000)


def test_shuffled_batches_are_refused():
    """Catches shuffled epochs accounted as Poisson sampling."""
    with pytest.raises(ArgumentError, match=r"not Poisson samples.*Train with PoissonSampler"):
        dp_event(1.0, ShuffledSampler(100, 10), 5)
    with pytest.raises(ArgumentError, match="not Poisson samples"):
        noise_multiplier_for(1.0, 1e-5, ShuffledSampler(100, 10), 5)


# Calibration


@pytest.mark.parametrize(
    ("target", "sampler", "steps", "accountant"),
    [
        (8.0, PoissonSampler(2000, 0.2), 100, "pld"),
        (8.0, PoissonSampler(2000, 0.2), 100, "rdp"),
        (0.5, PoissonSampler(2000, 0.05), 300, "pld"),
        (30.0, PoissonSampler(2000, 1.0), 3, "pld"),
        (50.0, PoissonSampler(100, 0.5, 40, "truncate"), 10, "pld"),
    ],
)
def test_calibration_never_overshoots_and_is_tight(target, sampler, steps, accountant):
    """Catches the wrong end of a bracket, and a search that stops early."""
    sigma = noise_multiplier_for(target, 1e-5, sampler, steps, accountant)
    assert epsilon(dp_event(sigma, sampler, steps), 1e-5, accountant) <= target
    assert epsilon(dp_event(sigma * (1 - 2e-4), sampler, steps), 1e-5, accountant) > target


def test_calibration_at_the_ends_of_its_range():
    """Catches a search without end where any noise is enough, and where none is."""
    assert noise_multiplier_for(1.0, 0.5, PoissonSampler(1000, 0.001), 1) == 1 / 64
    with pytest.raises(ArgumentError, match=r"No noise multiplier up to 2\^20"):
        noise_multiplier_for(1.0, 1e-5, PoissonSampler(1000, 1.0), 10**14, "rdp")


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dp_event(-1.0, PoissonSampler(10, 0.1), 1), "noise_multiplier >= 0, got noise_multiplier=-1.0"),
        (lambda: dp_event(math.nan, PoissonSampler(10, 0.1), 1), "noise_multiplier=nan"),
        (lambda: dp_event(math.inf, PoissonSampler(10, 0.1), 1), "noise_multiplier=inf"),
        (lambda: dp_event(1.0, PoissonSampler(10, 0.1), -1), "steps to be an integer >= 0, got steps=-1"),
        (lambda: dp_event(1.0, PoissonSampler(10, 0.1), 1.5), "steps=1.5"),
        (lambda: dp_event(1.0, 0.1, 1), "PoissonSampler, got float"),
        (lambda: _epsilon(1.0, 0.1, 1, 0.0), "0 < delta < 1, got delta=0.0"),
        (lambda: _epsilon(1.0, 0.1, 1, 1.0), "delta=1.0"),
        (lambda: _epsilon(1.0, 0.1, 1, 1e-5, "gdp"), "'pld' or 'rdp', got accountant='gdp'"),
        (lambda: epsilon(dp_accounting.UnsupportedDpEvent(), 1e-5), "does not support"),
        (lambda: noise_multiplier_for(0.0, 1e-5, PoissonSampler(10, 0.1), 1), "target_epsilon=0.0"),
        (lambda: noise_multiplier_for(math.inf, 1e-5, PoissonSampler(10, 0.1), 1), "target_epsilon=inf"),
        (lambda: noise_multiplier_for(1.0, 0.0, PoissonSampler(10, 0.1), 1), "delta=0.0"),
        (lambda: noise_multiplier_for(1.0, 1e-5, PoissonSampler(10, 0.1), 0), "steps >= 1, got steps=0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_missing_extra_is_named(monkeypatch):
    """Catches an import at the top of the module, and an error that does not say what to install."""
    event = dp_event(1.0, PoissonSampler(10, 0.1), 1)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for call in (
        lambda: dp_event(1.0, PoissonSampler(10, 0.1), 1),
        lambda: epsilon(event, 1e-5),
        lambda: noise_multiplier_for(1.0, 1e-5, PoissonSampler(10, 0.1), 1),
    ):
        with pytest.raises(MissingExtraError, match=r'pip install "pegrad\[accounting\]"'):
            call()
    monkeypatch.delitem(sys.modules, "pegrad.accounting")
    __import__("pegrad.accounting")
