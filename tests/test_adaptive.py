"""Adaptive clipping: what one example can move, what noise it gets, what it costs, and where the bound goes."""

import math
from dataclasses import dataclass

import dp_accounting as dp
import pytest
import torch
from scipy import stats

import pegrad
from pegrad import accounting, optim, random, sampling, trees
from pegrad.accounting.ledger import joint
from pegrad.adaptive import Adaptive, centred_counts
from pegrad.clipping import Flat, Grouping

SIZE = 20_000


@dataclass(frozen=True)
class Halves:
    """Two groups: each leaf by itself."""

    bounds: tuple[float, float] = (0.5, 2.0)

    @property
    def sensitivity(self):
        return math.hypot(*self.bounds)

    def grouping(self, params):
        return Grouping((0, 1), tuple(map(Flat, self.bounds)), ("a", "b"))


def loss(params, x):
    return (params["a"] * x[:3]).sum() + (params["b"] * x[3:]).sum()


PARAMS = {"a": torch.zeros(3), "b": torch.zeros(5)}


def make(clip_norm=1.0, sigma=0.0, count=0.0, expected=4.0, loss=loss, **changes):
    names = ("quantile", "learning_rate")
    moving = Adaptive(clip_norm, count_noise_multiplier=count, **{k: changes.pop(k) for k in names if k in changes})
    changes = {"noise_multiplier": sigma, "expected_batch_size": expected} | changes
    return pegrad.dp_sgd(loss, optim.sgd(1.0), clip_norm=moving, **changes)


def counts(step, state, after):
    """Work out the released counts from how the bounds moved."""
    rate, quantile = step.adaptive.learning_rate, step.adaptive.quantile
    moved = [-math.log(b / a) / rate for a, b in zip(state.bounds, after.bounds, strict=True)]
    return [(each + quantile - 0.5) * step.clipped_grad.normalize_by for each in moved]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 7.5])
@pytest.mark.parametrize("count", [7.6, 20.0, 1e4])
def test_the_budget_is_split_exactly(sigma, count):
    """Catches: σ_count taken for its deviation; a split of σ in place of 1/σ²."""
    gradients = Adaptive(1.0, count_noise_multiplier=count).gradient_noise_multiplier(sigma)
    assert gradients > sigma
    assert joint(gradients, count) == pytest.approx(sigma, rel=1e-12)
    deviation = count / 2  # the paper's parameter, of counts that one example moves by 1/2
    assert gradients == pytest.approx((sigma**-2 - (2 * deviation) ** -2) ** -0.5, rel=1e-12)


@pytest.mark.parametrize("clip_norm", [0.7, Halves()])
@pytest.mark.parametrize("at", [0, 3, 6, 7, 8])
def test_neighbours_move_sum_and_counts_within_the_joint_sensitivity(clip_norm, at):
    """Catches: counts divided by the actual batch size, not centred, or of padding; a sum clipped by other bounds."""
    torch.manual_seed(0)
    batch = torch.randn(9, 8) * torch.logspace(-2, 2, 9)[:, None]
    batch[7], batch[8] = float("nan"), float("inf")
    step = make(clip_norm)
    state = step.init(PARAMS, random.key(0))
    state = state._replace(bounds=tuple(1.5 * bound for bound in state.bounds))
    masks = torch.ones(9).bool(), torch.arange(9) != at
    with_it, without = (step.release(PARAMS, state, [(batch, mask)]) for mask in masks)
    row_out = torch.cat([batch[:at], batch[at + 1 :]])
    assert step.release(PARAMS, state, [(row_out, None)]).state.bounds == pytest.approx(without.state.bounds)
    moved = trees.map(lambda a, b: (a.double() - b.double()).square().sum(), with_it.grads, without.grads)
    of_sum = math.sqrt(sum(trees.leaves(moved))) / step.clipped_at(state).sensitivity
    assert of_sum <= 1 + 1e-4
    groups = len(state.bounds)
    changes = [
        a - b for a, b in zip(counts(step, state, with_it.state), counts(step, state, without.state), strict=True)
    ]
    assert [abs(change) for change in changes] == pytest.approx([0.5] * groups)
    std = Adaptive(1.0, count_noise_multiplier=1.0).count_noise_std(state.bounds)  # one multiplier is one sensitivity
    assert math.hypot(*changes) == pytest.approx(std)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 3.0, float("nan"), float("inf")])
def test_one_example_moves_each_count_by_a_half(value):
    """Catches: a norm that is not finite, or is the bound itself, that moves a count by nothing or by one."""
    norms = torch.tensor([[0.1, value, 2.0], [5.0, value, 0.0]])
    full, less = torch.ones(3).bool(), torch.tensor([True, False, True])
    change = centred_counts(norms, (1.0, 2.0), full) - centred_counts(norms, (1.0, 2.0), less)
    assert change.tolist() == [0.5 if value <= bound else -0.5 for bound in (1.0, 2.0)]
    assert centred_counts(norms[0], (1.0,), full).shape == (1,)


def wide_loss(params, x):
    return (params["a"] * x).sum()


@pytest.mark.parametrize("bound", [0.5, 8.0])
def test_noise_follows_the_current_bound(bound):
    """Catches: noise from the bound that the run began with; σ on the gradients that leaves nothing for the counts."""
    step = make(sigma=1.3, count=2.0, expected=4.0, loss=wide_loss)
    params = {"a": torch.zeros(SIZE)}
    state = step.init(params, random.key(0))._replace(bounds=(bound,))
    noise = step.release(params, state, [(torch.zeros(2, SIZE), None)]).grads["a"].double().numpy()
    std = (1.3**-2 - 2.0**-2) ** -0.5 * bound / 4
    assert stats.kstest(noise / std, "norm").pvalue > 1e-3
    for wrong in (1.3 * bound / 4, std / bound):
        assert stats.kstest(noise / wrong, "norm").pvalue < 1e-6


@pytest.mark.parametrize(("clip_norm", "groups"), [(1.0, 1), (Halves(), 2)])
def test_counts_get_noise_of_the_stated_law(clip_norm, groups):
    """Catches: noise over the sensitivity of one count, none at all, or the gradients' own values again."""
    step = make(clip_norm, sigma=1.0, count=6.0, expected=50.0, learning_rate=0.01)
    found: list[float] = []
    for seed in range(600):
        state = step.init(PARAMS, random.key(seed))
        after = step.release(PARAMS, state, []).state
        found += counts(step, state, after)
    std = 6.0 * math.sqrt(groups) / 2
    assert stats.kstest(torch.tensor(found).numpy() / std, "norm").pvalue > 1e-3
    for wrong in (std * 2, std / 2, 6.0 / 2 if groups > 1 else 6.0):
        assert stats.kstest(torch.tensor(found).numpy() / wrong, "norm").pvalue < 1e-4


def test_counts_and_gradients_share_no_noise():
    """Catches: counts that take the keystream of a leaf."""
    step = make(sigma=1.0, count=6.0, learning_rate=0.01, loss=lambda p, x: (p * x).sum())
    params = torch.zeros((), dtype=torch.float64)
    pairs = []
    for seed in range(300):
        state = step.init(params, random.key(seed))
        out = step.release(params, state, [])
        pairs.append((float(out.grads), counts(step, state, out.state)[0]))
    assert abs(stats.pearsonr(*zip(*pairs, strict=True)).statistic) < 0.2


@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_the_bound_converges_to_the_quantile(start, quantile):
    """Catches: a bound that moves away from the quantile, or to the quantile of those above."""
    torch.manual_seed(0)
    norms = torch.rand(500) * 4 + 1
    data = norms[:, None] * torch.nn.functional.normalize(torch.randn(500, 8), dim=1)
    sampler = sampling.PoissonSampler(500, 0.2)
    step = make(start, sigma=1.0, count=10.0, expected=100.0, quantile=quantile)
    params, state = PARAMS, step.init(PARAMS, random.key(1))
    path = []
    for _ in range(150):
        draw = sampler(random.key(2), state.step)
        params, state, _ = step(params, state, sampling.gather(data, draw), draw.mask)
        path.append(state.bounds[0])
    expected = float(norms.quantile(quantile))
    assert sum(path[-50:]) / 50 == pytest.approx(expected, rel=0.1)


def test_each_group_follows_its_own_quantile():
    """Catches: one count for all groups, or bounds in another order than the groups."""
    data = torch.cat([0.2 * torch.ones(50, 3), 7.0 * torch.ones(50, 5)], 1)
    data *= torch.linspace(0.5, 1.5, 50)[:, None]
    step = make(Halves(), expected=50.0)
    params, state = PARAMS, step.init(PARAMS, random.key(1))
    for _ in range(150):
        params, state, metrics = step(params, state, data)
    assert metrics.norms.shape == (2, 50)
    assert state.bounds == pytest.approx([0.2 * 3**0.5, 7 * 5**0.5], rel=0.1)
    assert step.clipped_at(state).sensitivity == pytest.approx(math.hypot(*state.bounds) / 50)


def test_the_batch_size_is_not_in_the_bound():
    """Catches: a fraction of the actual batch, as Opacus takes; or of the rows with padding."""
    step = make(expected=100.0, quantile=0.5)
    state = step.init(PARAMS, random.key(0))
    small = torch.zeros(6, 8)
    after = step.release(PARAMS, state, [(small, torch.tensor([True] * 4 + [False] * 2))]).state
    assert counts(step, state, after) == pytest.approx([4 / 2])
    again = step.release(PARAMS, state, [(small[:1], None)] * 4).state
    assert again.bounds == pytest.approx(after.bounds)


@pytest.mark.parametrize("far", [1e-9, 1e9])
def test_the_bound_stays_where_gradients_can_be_measured(far):
    """Catches: a bound that underflows, or a factor that overflows."""
    step = make(expected=1e-3, learning_rate=1e3)
    state = step.init(PARAMS, random.key(0))._replace(bounds=(far,))
    for batch in (torch.zeros(5, 8), 1e15 * torch.ones(5, 8)):
        (bound,) = step.release(PARAMS, state, [(batch, None)]).state.bounds
        assert 1e-9 <= bound <= 1e9


@pytest.mark.parametrize("sampling_rate", [pytest.param(0.02, marks=pytest.mark.slow), 1.0])
def test_adaptive_steps_cost_what_dp_accounting_composes(sampling_rate):
    """Catches: counts that cost nothing, or that are accounted as of a batch of their own."""
    sampler = sampling.PoissonSampler(1000, sampling_rate)
    step = make(sigma=1.1, count=1.5, expected=20.0, sampler=sampler)
    state = step.init(PARAMS, random.key(0))
    for _ in range(3):
        state = step.release(PARAMS, state, []).state
    (entry,) = state.ledger.entries
    both = dp.ComposedDpEvent([dp.GaussianDpEvent(entry.noise_multiplier), dp.GaussianDpEvent(1.5)])
    sampled = both if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, both)
    composed = accounting.epsilon(dp.SelfComposedDpEvent(sampled, 3), 1e-5, "rdp")
    assert accounting.epsilon(state.ledger, 1e-5, "rdp") == pytest.approx(composed, rel=1e-6)
    fixed = accounting.dp_event(1.1, sampler, 3)
    assert accounting.epsilon(state.ledger, 1e-5) == pytest.approx(accounting.epsilon(fixed, 1e-5), rel=1e-3)


@dataclass(frozen=True)
class Unbounded:
    """A clipping without clip norms."""

    sensitivity: float = 1.0

    def grouping(self, params):
        @dataclass(frozen=True)
        class Normalised:
            clip_norm: float = 0.0
            bound: float = 1.0

        return Grouping.flat(2, Normalised())


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make(sigma=1.0, count=1.0), "above noise_multiplier=1.0"),
        (lambda: make(sigma=1.0, count=0.0), "above noise_multiplier=1.0"),
        (lambda: make(count=-1.0), "count_noise_multiplier=-1.0"),
        (lambda: make(count=float("nan")), "count_noise_multiplier=nan"),
        (lambda: make(quantile=1.5), "quantile=1.5"),
        (lambda: make(learning_rate=0.0), "learning_rate"),
        (lambda: make(clip_norm=0.0), "clip_norm=0.0"),
        (lambda: make(Unbounded()).init(PARAMS, random.key(0)), "none to adapt"),
    ],
)
def test_arguments(make_it, message):
    with pytest.raises(pegrad.ArgumentError, match=message):
        make_it()


def test_a_state_of_another_step_is_refused():
    """Catches: a fixed run's state that an adaptive step takes for one without groups."""
    step = make()
    fixed = pegrad.dp_sgd(loss, optim.sgd(1.0), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=1)
    state = fixed.init(PARAMS, random.key(0))
    with pytest.raises(pegrad.ArgumentError, match=r"state\.bounds"):
        step(PARAMS, state, torch.ones(1, 8))
    with pytest.raises(pegrad.ArgumentError, match="2 adaptive clip norms, but the step clips 1"):
        step(PARAMS, state._replace(bounds=(1.0, 1.0)), torch.ones(1, 8))
