"""The law of the batches. Keys are fixed, so every statistic here is a constant."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pegrad import random
from pegrad.errors import ArgumentError, BatchOverflowError, LeafError
from pegrad.random import aes
from pegrad.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    Draw,
    FixedSizeSampler,
    PoissonSampler,
    ShuffledSampler,
    UserDraw,
    UserSampler,
    gather,
)

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

    monkeypatch.setattr(aes, "keystream", lambda *_: Constant())
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


# Cyclic Poisson


def _drawn(sampler, key, steps):
    """Which examples were drawn: boolean, (steps, n)."""
    rows = torch.zeros(steps, sampler.num_examples, dtype=torch.bool)
    for step in range(steps):
        draw = sampler(key, step)
        rows[step, draw.indices[draw.mask]] = True
    return rows.numpy()


def test_cyclic_blocks_take_turns():
    """Catches: a block drawn anew in each cycle, with which an example takes part more often than is charged."""
    drawn = _drawn(CyclicPoissonSampler(200, 1.0, 5), random.key(7), 15)
    assert (drawn[:5].sum(0) == 1).all()
    assert (drawn[:5] == drawn[5:10]).all()
    assert (drawn[:5] == drawn[10:]).all()
    part = _drawn(CyclicPoissonSampler(200, 0.5, 5), random.key(7), 15)
    assert part.any()
    assert not (part & ~drawn).any()
    assert (part[:5] != part[5:10]).any()
    assert (_drawn(CyclicPoissonSampler(200, 1.0, 5), random.key(8), 5) != drawn[:5]).any()


def test_cyclic_includes_at_the_rate():
    """Catches: a rate of the whole data set's, and tosses that two steps share."""
    sampler, cycles = CyclicPoissonSampler(60, 0.3, 3), 1000
    drawn = _drawn(sampler, random.key(9), 3 * cycles).reshape(cycles, 3, 60)
    counts, blocks = drawn.sum((0, 1)), drawn.any(0).sum(0)
    assert (blocks == 1).all()
    statistic = ((counts - cycles * 0.3) ** 2).sum() / (cycles * 0.3 * 0.7)
    assert 0.01 < stats.chi2.sf(statistic, 60) < 0.99
    unit = (drawn.any(1) - 0.3) / math.sqrt(0.3 * 0.7)
    for correlations in (
        (unit.T @ unit / math.sqrt(cycles))[np.triu_indices(60, 1)],
        (unit[:-1].T @ unit[1:] / math.sqrt(cycles - 1)).flatten(),
    ):
        assert abs(correlations).max() < 5
        assert stats.kstest(correlations, "norm").pvalue > 0.01


def _assignments(sampler, parts, trials):
    """The part that each example was dealt to, under one key after another: (trials, n)."""
    return np.stack([_drawn(sampler, random.key(100 + trial), parts).argmax(0) for trial in range(trials)])


def _assert_uniform_and_independent(dealt, parts):
    trials, n = dealt.shape
    for example in range(n):
        assert stats.chisquare(np.bincount(dealt[:, example], minlength=parts)).pvalue > 1e-4
    same = [(dealt[:, i] == dealt[:, j]).sum() for i in range(n) for j in range(i)]
    z = (np.array(same) - trials / parts) / math.sqrt(trials / parts * (1 - 1 / parts))
    assert abs(z).max() < 5
    assert stats.kstest(z, "norm").pvalue > 0.001


def test_cyclic_blocks_are_independent():
    """Catches: blocks of equal size, and blocks by position, where one example more or less moves the others."""
    _assert_uniform_and_independent(_assignments(CyclicPoissonSampler(30, 1.0, 4, 30), 4, 800), 4)


# Balls in bins


def test_balls_in_bins_deals_each_example_once():
    """Catches: an epoch that loses an example, and epochs that are alike."""
    sampler = BallsInBinsSampler(100, 7)
    epochs = _drawn(sampler, random.key(10), 21).reshape(3, 7, 100)
    assert (epochs.sum(1) == 1).all()
    assert (epochs[0] != epochs[1]).any()
    assert sampler.expected_batch_size == pytest.approx(100 / 7)


def test_balls_in_bins_is_uniform_and_independent():
    """Catches: bins of one size, a bin that is empty, examples that go together, epochs that depend on each other."""
    sampler = BallsInBinsSampler(30, 4, 30)
    dealt = _drawn(sampler, random.key(11), 4 * 800).reshape(800, 4, 30).argmax(1)
    _assert_uniform_and_independent(dealt, 4)
    kept = (dealt[1:] == dealt[:-1]).sum(0)
    assert stats.chi2.sf(((kept - 799 / 4) ** 2).sum() / (799 * 3 / 16), 30) > 0.01


@pytest.mark.parametrize("sampler", [CyclicPoissonSampler(100, 0.5, 5, 3), BallsInBinsSampler(100, 10, 3)])
def test_what_does_not_fit_is_an_error(sampler):
    """Catches silent truncation."""
    with pytest.raises(BatchOverflowError, match=r"drew more than max_batch_size=3 of 100.*raise max_batch_size\."):
        sampler(random.key(0), 0)


@pytest.mark.parametrize("sampler", [CyclicPoissonSampler(5000, 0.2, 4), BallsInBinsSampler(5000, 20)])
def test_dealt_batches_have_room(sampler):
    """Catches: rows for another rate."""
    assert sampler.rows == PoissonSampler(5000, 0.05).rows
    assert sampler.expected_batch_size == pytest.approx(250)
    assert sampler.overflow_probability < 1e-24


# Fixed size


def test_fixed_size_draws_each_subset_alike():
    """Catches: a subset that is not uniform, and padding."""
    sampler = FixedSizeSampler(6, 2)
    counts = dict.fromkeys(itertools.combinations(range(6), 2), 0)
    for step in range(3000):
        draw = sampler(random.key(12), step)
        assert draw.mask.all()
        assert draw.indices.shape == (2,)
        counts[tuple(sorted(draw.indices.tolist()))] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert sampler.expected_batch_size == 2


def test_fixed_size_steps_are_independent():
    """Catches: the pieces of a shuffle, in which no example comes twice in a row."""
    drawn = _drawn(FixedSizeSampler(20, 5), random.key(13), 2000)
    both = (drawn[1:] & drawn[:-1]).sum()
    assert stats.binomtest(int(both), 1999 * 20, 1 / 16).pvalue > 0.01


# Users


OWNERS = torch.tensor([3, 0, 1, 3, 3, 1, 3, 5, 3])  # users 2 and 4 have no records


def test_users_are_drawn_as_examples_are():
    """Catches: users drawn by their records."""
    inner = PoissonSampler(6, 0.5)
    users = UserSampler(OWNERS, inner, 3)
    for step in range(200):
        draw = users(random.key(14), step)
        expected = inner(random.split(random.key(14))[0], step)
        drawn = [user for user in expected.indices[expected.mask].tolist() if user in OWNERS]
        assert OWNERS[draw.indices[draw.mask][:, 0]].tolist() == drawn
        assert draw.mask.shape == expected.mask.shape
    assert users.rows == inner.rows
    assert users.expected_batch_size == 3


def test_a_user_contributes_only_its_own_records():
    """Catches: a record of another's, a record twice, padding that counts, a user who has none."""
    users = UserSampler(OWNERS, PoissonSampler(6, 0.7), 3)
    for step in range(100):
        indices, mask, records, truncated = users(random.key(15), step)
        assert indices.shape == records.shape == (users.rows, 3)
        assert not truncated
        assert not records[~mask].any()
        assert not indices[~records].any()
        for row in mask.nonzero().squeeze(1):
            mine = indices[row][records[row]]
            user = OWNERS[mine[0]]
            assert (OWNERS[mine] == user).all()
            assert len(set(mine.tolist())) == len(mine) == min(3, OWNERS.tolist().count(user))


def test_records_beyond_k_are_a_uniform_subset():
    """Catches: the first k records always, or the same ones at every step."""
    users = UserSampler(OWNERS, PoissonSampler(6, 1.0), 2)
    counts = dict.fromkeys(itertools.combinations([0, 3, 4, 6, 8], 2), 0)
    for step in range(2000):
        draw = users(random.key(16), step)
        counts[tuple(draw.indices[draw.mask & (OWNERS[draw.indices[:, 0]] == 3)][0].tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_gather_takes_the_records_of_users():
    dataset = {"x": torch.arange(18.0).view(9, 2)}
    draw = UserSampler(OWNERS, PoissonSampler(6, 1.0), 3)(random.key(0), 0)
    batch = gather(dataset, draw)
    assert isinstance(draw, UserDraw)
    assert batch["x"].shape == (6, 3, 2)
    assert torch.equal(batch["x"][..., 0].long() // 2, draw.indices)


# All


@pytest.mark.parametrize(
    "sampler",
    [
        PoissonSampler(100, 0.3),
        ShuffledSampler(100, 30),
        FixedSizeSampler(100, 30),
        CyclicPoissonSampler(100, 0.8, 3),
        BallsInBinsSampler(100, 5),
        UserSampler(torch.arange(100) // 3, PoissonSampler(34, 0.4), 2),
    ],
)
def test_draws_are_functions_of_key_and_step(sampler):
    """Catches hidden state, and a key or a step that is left out."""
    keys = [random.key(0), random.key(1)]
    draws = [[sampler(key, step) for step in range(4)] for key in keys]
    for key, row in zip(keys, draws, strict=True):
        for step in (3, 0):
            again = sampler(key, step)
            assert torch.equal(again.indices, row[step].indices)
            assert torch.equal(again.mask, row[step].mask)
    assert len({tuple(draw.indices.flatten().tolist()) for row in draws for draw in row}) == 8


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
        (lambda: FixedSizeSampler(10, 11), "batch_size <= num_examples=10, got batch_size=11"),
        (lambda: FixedSizeSampler(10, 0), "batch_size=0"),
        (lambda: CyclicPoissonSampler(10, 0.0, 2), "sampling_rate=0.0"),
        (lambda: CyclicPoissonSampler(10, 0.1, 0), "num_blocks to be an integer >= 1"),
        (lambda: BallsInBinsSampler(10, 0), "steps_per_epoch to be an integer >= 1"),
        (lambda: BallsInBinsSampler(10, 2, 0), "max_batch_size=0"),
        (lambda: UserSampler(OWNERS, ShuffledSampler(6, 2), 3), "number of users, sampling_rate.*ShuffledSampler"),
        (lambda: UserSampler(OWNERS, PoissonSampler(6, 0.1), 0), "max_records=0"),
        (lambda: UserSampler(OWNERS, PoissonSampler(5, 0.1), 3), "owners from 0 to 4"),
        (lambda: UserSampler(OWNERS - 1, PoissonSampler(6, 0.1), 3), "owners from 0 to 5"),
        (lambda: UserSampler(OWNERS.float(), PoissonSampler(6, 0.1), 3), "torch.int64 tensor of one axis"),
        (lambda: BallsInBinsSampler(10, 2)(random.key(0), -1), "step=-1"),
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
