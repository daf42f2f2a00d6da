"""Record and replay: runs on neighbouring data from one key differ by the clipped row and by nothing else."""

from dataclasses import dataclass

import pytest
import torch
import torch._dynamo  # a step during which it is first imported runs twice, and would be recorded twice

import pegrad
from cases import CASES
from oracle import clipped_sum, double, norms, per_example_grads, rows
from pegrad import auditing, optim, random, trees
from pegrad.per_example import ClippedGrad
from pegrad.sampling import PoissonSampler, gather

N, STEPS, RATE, LR, SIGMA, NORMALIZE_BY = 6, 3, 0.6, 0.25, 1.3, 2.5
TOLERANCE = 1e-10

MODELS = [
    "matmul_plus_bias",
    "tied_weight_used_three_times",
    "tied_embedding",
    "convolutions_with_in_place_activation",
    "normalisations",
]


def add_noise(key, grads, std, step):
    return pegrad.add_noise(key, grads, std, step=step)


def without(batch, mask, row, how):
    """The neighbour without a row: as padding, or as a batch that is shorter."""
    if how == "mask":
        return batch, mask & (torch.arange(len(mask)) != row)
    keep = torch.arange(len(mask)) != row
    return trees.map(lambda leaf: leaf[keep], batch), mask[keep]


@dataclass
class Recording:
    """What a step made on the way: the clipped sums and the noise, each as it was drawn."""

    sums: list
    noise: list


def recorded(monkeypatch, step, *arguments):
    """Take a step, and keep what was added up in it."""
    seen = Recording([], [])
    clip, draw = ClippedGrad.finish, random.each_normal

    def clip_and_keep(*args):
        out = clip(*args)
        seen.sums.append(trees.map(torch.clone, out))
        return out

    def draw_and_keep(*args):
        for out in draw(*args):
            seen.noise.append(out.flatten().clone())
            yield out

    with monkeypatch.context() as patch:
        patch.setattr(ClippedGrad, "finish", clip_and_keep)
        patch.setattr(random, "each_normal", draw_and_keep)
        return step(*arguments), seen


def minus(a, b):
    return [x - y for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True)]


def close(actual, expected, scale=1.0):
    return all((a - b).abs().max() <= TOLERANCE * scale for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("how", ["mask", pytest.param("absence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("microbatch_size", [pytest.param(None, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_neighbours_differ_by_the_clipped_row_alone(monkeypatch, model, strategy, microbatch_size, how):
    """Catches: noise or its scale that depends on data, a divisor that depends on the batch, statistics that examples
    share, noise once for each micro-batch, a state that remembers what was in the batch."""
    torch.manual_seed(0)
    case = CASES[model]
    params, batch = double(case.make())
    row_norms = norms(per_example_grads(case.loss, params, batch))
    clip_norm = float(row_norms.median())  # some rows are clipped, some are not
    dataset = trees.map(lambda leaf: torch.cat([leaf, leaf])[:N], batch)
    step = pegrad.dp_sgd(
        case.loss,
        auditing.recording(optim.sgd(LR)),
        clip_norm=clip_norm,
        noise_multiplier=SIGMA,
        expected_batch_size=NORMALIZE_BY,
        strategy=strategy,
        microbatch_size=microbatch_size,
    )
    sampler = PoissonSampler(N, RATE, max_batch_size=N)
    draws, noise_key = random.split(random.key(7))
    state = step.init(params, noise_key)
    all_noise = []
    for t in range(STEPS):
        draw = sampler(draws, t)
        full, row = gather(dataset, draw), int(draw.mask.sum()) - 1
        assert row >= 0
        (out, seen), (other, other_seen) = (
            recorded(monkeypatch, step, params, state, *given)
            for given in ((full, draw.mask), without(full, draw.mask, row, how))
        )
        # (a) The noise is the same, bit for bit, and drawn once for each leaf.
        assert len(seen.noise) == len(other_seen.noise) == len(trees.leaves(params))
        assert all(map(torch.equal, seen.noise, other_seen.noise))
        # (b) The sums differ by the row's clipped gradient, as the oracle has it.
        example = trees.map(lambda leaf: leaf[None], rows(full)[row])
        grads = per_example_grads(case.loss, params, example)
        expected = [leaf / NORMALIZE_BY for leaf in clipped_sum(grads, clip_norm)]
        assert len(seen.sums) == len(other_seen.sums) == 1
        moved = minus(seen.sums[0], other_seen.sums[0])
        assert close(moved, expected)
        assert norms([leaf[None] for leaf in moved]) <= step.clipped_grad.sensitivity * (1 + TOLERANCE)
        # (c) What is released is the sum and σ·Δ times the noise, in both.
        std = SIGMA * step.clipped_grad.sensitivity
        for run, record in ((out, seen), (other, other_seen)):
            released = trees.leaves(run.state.optimizer.grads)
            added = [leaf.flatten() for leaf in minus(run.state.optimizer.grads, record.sums[0])]
            scale = 1 + max(float(leaf.abs().max()) for leaf in released)
            assert close(added, [std * drawn for drawn in record.noise], scale)
        # (d) The parameters differ by a function of that difference only.
        apart = minus(out.params, other.params)
        size = 1 + max(float(leaf.abs().max()) for leaf in trees.leaves(out.params))
        assert close(apart, [-LR * leaf for leaf in expected], size)
        # (e) Nothing else goes on to the next step.
        assert torch.equal(out.state.key, other.state.key)
        assert out.state.step == other.state.step == t + 1
        assert out.state.optimizer.inner == other.state.optimizer.inner
        # (f) The library's own comparison says so too.
        report = auditing.replay(
            step,
            params,
            state,
            (full, draw.mask),
            without(full, draw.mask, row, how),
            sensitivity=step.clipped_grad.sensitivity,
        )
        assert report.holds
        assert close(trees.leaves(report.difference), expected, scale)
        all_noise.append(seen.noise)
        params, state = out.params, out.state
    assert not any(torch.equal(a, b) for a, b in zip(all_noise[0], all_noise[1], strict=True))


@pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
def test_runs_on_neighbouring_data_sets_part_only_where_the_row_is_drawn(strategy):
    """Catches: draws of other examples that move when a row leaves the data set, steps without the row that differ."""
    torch.manual_seed(0)
    case = CASES["matmul_plus_bias"]
    params, batch = double(case.make())
    fewer = trees.map(lambda leaf: leaf[:-1], batch)
    n = len(batch[1])
    step = pegrad.dp_sgd(
        case.loss,
        auditing.recording(optim.sgd(LR)),
        clip_norm=0.5,
        noise_multiplier=SIGMA,
        expected_batch_size=n / 2,
        strategy=strategy,
    )
    draws, noise_key = random.split(random.key(3))
    state = step.init(params, noise_key)
    drawn = []
    for t in range(8):
        both = [PoissonSampler(size, 0.5, max_batch_size=n)(draws, t) for size in (n, n - 1)]
        given = [(gather(data, draw), draw.mask) for data, draw in zip((batch, fewer), both, strict=True)]
        report = auditing.replay(step, params, state, *given, sensitivity=step.clipped_grad.sensitivity)
        in_batch = bool((both[0].indices[both[0].mask] == n - 1).any())
        drawn.append(in_batch)
        assert report.holds
        if in_batch:
            grads = per_example_grads(case.loss, params, trees.map(lambda leaf: leaf[-1:], batch))
            expected = [leaf / (n / 2) for leaf in clipped_sum(grads, 0.5)]
            assert close(trees.leaves(report.difference), expected)
        else:
            assert report.distance == 0
        params, state, _ = step(params, state, *given[0])
    assert any(drawn)
    assert not all(drawn)


# Steps with one mistake each. `loss` has the gradient x, whatever the parameters are.


def loss(params, x):
    return params["w"] @ x + params["v"] * 0


PARAMS = {"w": torch.zeros(4, dtype=torch.float64), "v": torch.zeros((), dtype=torch.float64)}
OPTIMIZER = auditing.recording(optim.sgd(LR))


def clipped(batch, mask, normalize_by=1.0):
    return pegrad.clipped_grad(loss, clip_norm=1.0, normalize_by=normalize_by)(PARAMS, batch, mask).grads


def noisy(state, grads, std=SIGMA):
    return add_noise(state.key, grads, std, state.step)


def planted(released, following=lambda state, batch: (state.key, state.step + 1)):
    """A step that hands what `released(state, batch, mask)` returns to the optimizer."""

    def step(params, state, batch, mask=None):
        updates, kept = OPTIMIZER.update(released(state, batch, mask), state.optimizer, params)
        return optim.apply_updates(params, updates), pegrad.State(*following(state, batch), kept)

    return step


def right(state, batch, mask):
    return noisy(state, clipped(batch, mask))


def mean_by_actual_size(state, batch, mask):
    size = len(batch) if mask is None else int(mask.sum())
    return noisy(state, trees.map(lambda grad: grad / size, clipped(batch, mask)), SIGMA / 4)


def noise_scaled_by_the_batch(state, batch, mask):
    return noisy(state, clipped(batch, mask), SIGMA * float(batch.norm()))


def noise_for_each_example(state, batch, mask):
    return noisy(state, clipped(batch, mask), SIGMA * len(batch) ** 0.5)


def key_from_the_data(state, batch, mask):
    return add_noise(state.key, clipped(batch, mask), SIGMA, len(batch))


def noise_of_a_global_generator(state, batch, mask):
    return trees.map(lambda grad: grad + 1e-9 * torch.randn_like(grad), noisy(state, clipped(batch, mask)))


def mask_ignored(state, batch, mask):
    return noisy(state, clipped(batch, None))


def clipped_after_the_sum(state, batch, mask):
    return noisy(state, clipped(batch.sum(0, keepdim=True), None))


def centred_on_the_batch(state, batch, mask):
    return noisy(state, clipped(batch - batch.mean(0), mask))


def not_clipped(state, batch, mask):
    return noisy(state, {"w": batch.sum(0), "v": PARAMS["v"]})


def nan_from_an_example(state, batch, mask):
    return noisy(state, {"w": clipped(batch, mask)["w"] / (batch.sum() - 9), "v": PARAMS["v"]})


# Rows that agree, and one that opposes them with all its might.
OPPOSED = torch.cat([torch.eye(4)[:1].repeat(3, 1), -torch.eye(4)[:1]]).double() * 3
# Padding repeats row 0, as `pegrad.sampling.gather` has it.
PADDED = torch.eye(4).double()[[0, 1, 0, 0]], torch.tensor([True, True, False, False])
PADDED_WITHOUT_ROW_0 = torch.eye(4).double()[[1, 1, 1, 1]], torch.tensor([True, False, False, False])


def opposed(step):
    return replayed(step, (OPPOSED, None), (OPPOSED[:3], None))


def replayed(step, batch, neighbour, sensitivity=1.0):
    state = pegrad.State(random.key(0), 0, OPTIMIZER.init(PARAMS))
    return auditing.replay(step, PARAMS, state, batch, neighbour, sensitivity=sensitivity)


def test_a_right_step_holds():
    """Catches: a comparison that finds fault with everything."""
    assert opposed(planted(right)).holds
    assert replayed(planted(right), PADDED, PADDED_WITHOUT_ROW_0).holds
    report = opposed(planted(right))
    assert report.distance == pytest.approx(1, rel=1e-12)
    assert not replayed(planted(right), (OPPOSED, None), (OPPOSED[:3], None), sensitivity=0.99).holds
    assert "tensor" not in repr(report)


@pytest.mark.parametrize(
    "bug",
    [
        noise_scaled_by_the_batch,
        noise_for_each_example,
        key_from_the_data,
        noise_of_a_global_generator,
        centred_on_the_batch,
        not_clipped,
        nan_from_an_example,
    ],
)
def test_every_planted_bug_is_found(bug):
    """Catches: a comparison that looks away."""
    assert not opposed(planted(bug)).holds


def test_a_divisor_that_depends_on_the_batch_is_found():
    """Catches: the mean over the batch, whose sensitivity is twice that of the sum over the same size."""
    report = replayed(planted(mean_by_actual_size), (OPPOSED, None), (OPPOSED[:3], None), sensitivity=1 / 4)
    assert report.distance == pytest.approx(2 / 4, rel=1e-12)
    assert not report.holds


def test_padding_that_counts_is_found():
    """Catches: a neighbour by mask only, which a step that ignores masks does not tell apart."""
    assert not replayed(planted(mask_ignored), PADDED, PADDED_WITHOUT_ROW_0).holds


def test_clipping_the_sum_is_found():
    """Catches: a bound on the whole sum, taken for a bound on each row."""
    batch = torch.stack([torch.eye(4)[0], -10 * torch.eye(4)[0]]).double()
    report = replayed(planted(clipped_after_the_sum), (batch, None), (batch[:1], None))
    assert report.distance == pytest.approx(2, rel=1e-12)
    assert not report.holds


@pytest.mark.parametrize(
    "following",
    [lambda state, batch: (state.key, state.step + len(batch)), lambda state, batch: (random.key(len(batch)), 1)],
    ids=["counter", "key"],
)
def test_a_state_that_remembers_the_batch_is_found(following):
    """Catches: a counter of examples, or a key, that goes on without noise."""
    report = opposed(planted(right, following))
    assert report.distance <= report.bound
    assert not report.holds


def test_rounding_is_allowed_for_and_no_more():
    """Catches: float32 noise, many times the sensitivity, taken for a violation; or a bound that rounding swallows."""
    step = pegrad.dp_sgd(
        loss, auditing.recording(optim.sgd(LR)), clip_norm=1e-3, noise_multiplier=10_000.0, expected_batch_size=1.0
    )
    params = {"w": torch.zeros(20_000), "v": torch.zeros(())}
    state = step.init(params, random.key(0))
    batch = torch.ones(4, 20_000)
    report = auditing.replay(step, params, state, (batch, None), (batch[1:], None), sensitivity=1e-3)
    assert report.holds
    assert report.distance > 1.03e-3
    assert report.bound < 1.4e-3


def test_wrong_arguments_are_refused():
    """Catches: a comparison of nothing with nothing."""
    plain = pegrad.dp_sgd(loss, optim.sgd(LR), clip_norm=1, noise_multiplier=1, expected_batch_size=1)
    given = PARAMS, plain.init(PARAMS, random.key(0)), (OPPOSED, None), (OPPOSED[:3], None)
    with pytest.raises(pegrad.ArgumentError, match="recording"):
        auditing.replay(plain, *given, sensitivity=1.0)
    with pytest.raises(pegrad.ArgumentError, match="sensitivity"):
        auditing.replay(plain, *given, sensitivity=0.0)


ADAPTIVE = {
    "flat": pegrad.Adaptive(1.0, count_noise_multiplier=9.0, learning_rate=0.3),
    "groups": pegrad.Adaptive(pegrad.clipping.PerLeaf(1.0), count_noise_multiplier=9.0, quantile=0.8),
}


def adaptive(name, normalize_by=2.5, kind=pegrad.DPSGD):
    step = pegrad.dp_sgd(
        two_leaves,
        OPTIMIZER,
        clip_norm=ADAPTIVE[name],
        noise_multiplier=SIGMA,
        expected_batch_size=normalize_by,
    )
    return kind(**vars(step))


def two_leaves(params, x):
    return params["w"] @ x + params["v"] * x.sum()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_step_holds(name):
    """Catches: a comparison by the first bounds and not by the state's; counts that move by more than a half each."""
    step = adaptive(name)
    state = step.init(PARAMS, random.key(0))
    state = state._replace(bounds=tuple(3 * bound for bound in state.bounds))
    given = (OPPOSED, None), (OPPOSED[:3], None)
    report = auditing.replay(step, PARAMS, state, *given, sensitivity=step.clipped_at(state).sensitivity)
    assert report.holds
    assert report.count_distance == pytest.approx(1, abs=1e-9)
    assert report.distance == pytest.approx(step.clipped_at(state).sensitivity, rel=1e-6)
    assert not auditing.replay(step, PARAMS, state, *given, sensitivity=step.clipped_grad.sensitivity).holds
    same = auditing.replay(step, PARAMS, state, given[0], given[0], sensitivity=1.0)
    assert same.count_distance == same.distance == 0


class ByTheActualSize(pegrad.DPSGD):
    """Divides its counts by the size of the batch, as Opacus does."""

    def bounds(self, before, after, batch):
        power = self.clipped_grad.normalize_by / len(batch)
        return tuple(a * (b / a) ** power for a, b in zip(before, after, strict=True))

    def __call__(self, params, state, batch, mask=None):
        out = super().__call__(params, state, batch, mask)
        return out._replace(state=out.state._replace(bounds=self.bounds(state.bounds, out.state.bounds, batch)))


class ByTheNorm(ByTheActualSize):
    """Takes the largest norm in the batch for its next bound."""

    def bounds(self, before, after, batch):
        return tuple(bound * float(batch.norm(dim=1).max()) for bound in after)


class ByAGlobalGenerator(ByTheActualSize):
    """Adds noise to its bounds that no key knows."""

    def bounds(self, before, after, batch):
        return tuple(bound * (1 + 1e-9 * float(torch.rand(()))) for bound in after)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("kind", [ByTheActualSize, ByTheNorm, ByAGlobalGenerator])
def test_bounds_that_tell_more_than_the_counts_are_found(name, kind):
    """Catches: a step said to hold although half of what it released was not looked at."""
    step = adaptive(name, normalize_by=8.0, kind=kind)
    state = step.init(PARAMS, random.key(0))
    larger = torch.cat([OPPOSED, 5 * OPPOSED[-1:]])
    report = auditing.replay(
        step, PARAMS, state, (larger, None), (OPPOSED, None), sensitivity=step.clipped_at(state).sensitivity
    )
    assert report.distance <= report.bound
    assert not report.holds


def test_bounds_without_a_step_that_says_how_they_move_are_refused():
    """Catches: counts that are not looked at."""
    step = adaptive("flat")
    state = step.init(PARAMS, random.key(0))
    with pytest.raises(pegrad.ArgumentError, match=r"without step\.adaptive"):
        auditing.replay(
            lambda *given: step(*given), PARAMS, state, (OPPOSED, None), (OPPOSED[:3], None), sensitivity=1.0
        )
