"""The law of the batches. Keys are fixed, so every statistic here is a constant."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pegrad import random
from pegrad.errors import ArgumentError, BatchOverflowError, LeafError
from pegrad.sampling import Draw, PoissonSampler, ShuffledSampler, gather

N, Q, STEPS = 40, 0.3, 4000


@pytest.fixture(scope="module")
def included():
    """Which examples were drawn: boolean, (STEPS, N)."""
    sampler, key = PoissonSampler(N, Q), random.key(1)
    rows = torch.zeros(STEPS, N, dtype=torch.bool)
    for step in range(STEPS):
        draw = sampler(key, step)
        rows[step, draw.indices[draw.mask]] = True
    return rows.double().numpy()


# Poisson


def test_poisson_includes_at_the_sampling_rate(included):
    """Catches a wrong rate and one that depends on the example; shows that rates 5% off are rejected."""
    counts = included.sum(0)
    for rate, accepted in ((Q, True), (1.05 * Q, False), (0.95 * Q, False)):
        statistic = ((counts - STEPS * rate) ** 2).sum() / (STEPS * rate * (1 - rate))
        assert (0.01 < stats.chi2.sf(statistic, N) < 0.99) == accepted


@pytest.mark.parametrize(("word", "drawn"), [(2**20 - 1, True), (2**20, False), (2**32, False)])
def test_poisson_compares_all_53_bits(monkeypatch, word, drawn):
    """Catches uniforms of 24 bits (float32), under which a rate below 2^-24 draws nothing and others are rounded."""

    class Constant:
        def update_into(self, zeros, buffer):
            buffer[: len(zeros)] = word.to_bytes(8, "little") * (len(zeros) // 8)

    monkeypatch.setattr(random, "_keystream", lambda key, purpose: Constant())
    assert PoissonSampler(3, 2.0**-33, 3)(random.key(0), 0).mask.any() == drawn


def test_poisson_batch_sizes_are_binomial(included):
    """Catches a fixed size and anything that couples the examples of a batch."""
    sizes = np.bincount(included.sum(1).astype(int), minlength=N + 1)
    expected = STEPS * stats.binom.pmf(np.arange(N + 1), N, Q)
    common = expected > 5
    observed = np.append(sizes[common], sizes[~common].sum())
    assert stats.chisquare(observed, np.append(expected[common], expected[~common].sum())).pvalue > 0.01


def test_poisson_pairs_are_independent(included):
    """Catches uniforms shared by two examples, or by two steps."""
    unit = (included - Q) / math.sqrt(Q * (1 - Q))
    same_step = (unit.T @ unit / math.sqrt(STEPS))[np.triu_indices(N, 1)]
    next_step = (unit[:-1].T @ unit[1:] / math.sqrt(STEPS - 1)).flatten()
    for correlations in (same_step, next_step):
        assert abs(correlations).max() < 5
        assert stats.kstest(correlations, "norm").pvalue > 0.01


def test_poisson_empty_batches():
    """Catches a sampler that avoids the empty batch, which must be as likely as it is."""
    sampler, trials = PoissonSampler(num_examples=20, sampling_rate=0.1), 3000
    empty = sum(not sampler(random.key(2), step).mask.any() for step in range(trials))
    assert stats.binomtest(empty, trials, 0.9**20).pvalue > 0.01
    draw = PoissonSampler(num_examples=3, sampling_rate=1e-12, max_batch_size=1)(random.key(0), 0)
    assert draw.indices.tolist() == [0]
    assert draw.mask.tolist() == [False]


def test_poisson_draws_are_padded_and_masked():
    """Catches a mask that is off by one, and padding that is not row 0."""
    sampler = PoissonSampler(num_examples=100, sampling_rate=0.2, max_batch_size=50)
    for step in range(50):
        draw = sampler(random.key(3), step)
        size = int(draw.mask.sum())
        assert draw.indices.shape == draw.mask.shape == (50,)
        assert draw.indices.dtype == torch.int64
        assert draw.mask.dtype == torch.bool
        assert draw.mask[:size].all()
        assert (draw.indices[:size].diff() > 0).all()
        assert draw.indices.max() < 100
        assert not draw.indices[size:].any()
        assert draw.truncated == 0


def test_poisson_of_rate_one_takes_all():
    draw = PoissonSampler(num_examples=7, sampling_rate=1)(random.key(0), 0)
    assert draw.indices.tolist() == list(range(7))
    assert draw.mask.all()


def test_overflow_is_an_error_by_default():
    """Catches silent truncation."""
    sampler = PoissonSampler(num_examples=10, sampling_rate=1.0, max_batch_size=9)
    with pytest.raises(BatchOverflowError, match="Step 4 drew more than max_batch_size=9 of 10"):
        sampler(random.key(0), 4)


def test_truncation_keeps_a_uniform_subset():
    """Catches truncation that prefers the first rows, and a count that is wrong."""
    sampler = PoissonSampler(num_examples=6, sampling_rate=1.0, max_batch_size=2, on_overflow="truncate")
    counts = dict.fromkeys(itertools.combinations(range(6), 2), 0)
    for step in range(3000):
        draw = sampler(random.key(4), step)
        assert draw.mask.all()
        assert draw.truncated == 4
        counts[tuple(sorted(draw.indices.tolist()))] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_truncation_takes_from_the_poisson_draw():
    """Catches truncation that draws anew, or fills the batch with examples that were not drawn."""
    full = PoissonSampler(num_examples=30, sampling_rate=0.5, max_batch_size=30)
    cut = PoissonSampler(num_examples=30, sampling_rate=0.5, max_batch_size=15, on_overflow="truncate")
    for step in range(100):
        drawn, kept = full(random.key(5), step), cut(random.key(5), step)
        assert int(kept.mask.sum()) + kept.truncated == int(drawn.mask.sum())
        assert set(kept.indices[kept.mask].tolist()) <= set(drawn.indices[drawn.mask].tolist())


@pytest.mark.parametrize("n", [1, 2, 10, 1437, 60_000, 10**7])
@pytest.mark.parametrize("q", [1e-6, 0.001, 0.1, 0.5, 0.93, 1.0])
def test_overflow_probability_is_the_binomial_tail(n, q):
    """Catches an error in either sum of the binomial, below and above the mean."""
    spread = math.sqrt(n * q * (1 - q))
    for deviations in (-6, -1, -0.1, 0, 0.1, 1, 6, 20):
        size = min(max(1, round(n * q + deviations * spread)), n)
        expected = stats.binom.sf(size, n, q)
        assert PoissonSampler(n, q, size).overflow_probability == pytest.approx(expected, rel=1e-6, abs=1e-290)


@pytest.mark.parametrize(
    ("n", "q"), [(1, 0.5), (20, 0.5), (1437, 0.1), (60_000, 256 / 60_000), (10**9, 1e-7), (5, 1.0)]
)
def test_default_maximum_is_the_least_that_is_safe(n, q):
    """Catches a bound that is loose or too low."""
    rows = PoissonSampler(n, q).rows
    assert stats.binom.sf(rows, n, q) <= stats.binom.sf(rows - 1, n - 1, q) <= 1e-24
    assert rows == 1 or stats.binom.sf(rows - 2, n - 1, q) > 1e-24


def test_expected_batch_size():
    assert PoissonSampler(1000, 0.25).expected_batch_size == 250


# Shuffled


def test_shuffled_epochs_cover_each_example_once():
    """Catches overlapping batches, a lost last batch, and epochs in the same order."""
    sampler, epochs = ShuffledSampler(num_examples=10, batch_size=4), []
    assert sampler.steps_per_epoch == 3
    for epoch in range(20):
        draws = [sampler(random.key(6), 3 * epoch + position) for position in range(3)]
        assert [int(draw.mask.sum()) for draw in draws] == [4, 4, 2]
        assert all(draw.indices.shape == draw.mask.shape == (4,) for draw in draws)
        epochs.append([row for draw in draws for row in draw.indices[draw.mask].tolist()])
        assert sorted(epochs[-1]) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 20


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(8, 4, 2), (8, 100, 1), (1, 1, 1), (9, 4, 3)])
def test_shuffled_steps_per_epoch(n, batch_size, steps):
    sampler = ShuffledSampler(n, batch_size)
    assert sampler.steps_per_epoch == steps
    assert sampler.rows == batch_size


# Both


@pytest.mark.parametrize("sampler", [PoissonSampler(100, 0.3), ShuffledSampler(100, 30)])
def test_draws_are_functions_of_key_and_step(sampler):
    """Catches hidden state, and a key or a step that is left out."""
    keys = [random.key(0), random.key(1)]
    draws = [[sampler(key, step) for step in range(4)] for key in keys]
    for key, row in zip(keys, draws, strict=True):
        for step in (3, 0):
            again = sampler(key, step)
            assert torch.equal(again.indices, row[step].indices)
            assert torch.equal(again.mask, row[step].mask)
    assert len({tuple(draw.indices.tolist()) for row in draws for draw in row}) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoissonSampler(0, 0.1), "num_examples to be an integer >= 1, got num_examples=0"),
        (lambda: PoissonSampler(10.0, 0.1), "num_examples=10.0"),
        (lambda: PoissonSampler(10, 0), "0 < sampling_rate <= 1, got sampling_rate=0"),
        (lambda: PoissonSampler(10, 1.1), "sampling_rate=1.1"),
        (lambda: PoissonSampler(10, math.nan), "sampling_rate=nan"),
        (lambda: PoissonSampler(10, 0.1, 0), "max_batch_size to be an integer >= 1"),
        (lambda: PoissonSampler(10, 0.1, 5, "ignore"), "on_overflow 'error' or 'truncate', got 'ignore'"),
        (lambda: ShuffledSampler(0, 1), "num_examples=0"),
        (lambda: ShuffledSampler(10, 0), "batch_size=0"),
        (lambda: PoissonSampler(10, 0.1)(random.key(0), -1), "step to be an integer >= 0, got step=-1"),
        (lambda: ShuffledSampler(10, 2)(random.key(0), -1), "step=-1"),
        (lambda: PoissonSampler(10, 0.1)(random.key(0), 0.5), "step=0.5"),
        (lambda: PoissonSampler(10, 0.1)(torch.zeros(2), 0), "Expected a key"),
        (lambda: ShuffledSampler(10, 2)(torch.zeros(2), 0), "Expected a key"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


# Gathering


def test_gather_takes_the_drawn_rows():
    """Catches rows of one leaf that are not those of another."""
    dataset = {"x": torch.arange(20.0).view(10, 2), "y": [torch.arange(10)]}
    draw = Draw(torch.tensor([3, 9, 0]), torch.tensor([True, True, False]))
    batch = gather(dataset, draw)
    assert batch["x"].tolist() == [[6, 7], [18, 19], [0, 1]]
    assert batch["y"][0].tolist() == [3, 9, 0]


def test_gather_refuses_what_is_no_data_set():
    draw = Draw(torch.tensor([3, 9]), torch.tensor([True, True]))
    with pytest.raises(ArgumentError, match=r"has 9 rows.*num_examples=9"):
        gather(torch.zeros(9, 2), draw)
    for dataset in ({"x": torch.zeros(10), "y": torch.zeros(11)}, {"x": 1.0}, {}, torch.tensor(1.0)):
        with pytest.raises(LeafError):
            gather(dataset, draw)
