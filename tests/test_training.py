"""Plans, steps with privacy and without, and what an evaluation says."""

import io
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pegrad import accounting, random, trees
from pegrad.clipping import PerLayer
from pegrad.dp_sgd import DPSGD
from pegrad.errors import ArgumentError
from pegrad.papers import plots
from pegrad.papers.data import Dataset
from pegrad.papers.models import Model
from pegrad.papers.training import (
    CLIPPINGS,
    PRESETS,
    PlainSGD,
    Privacy,
    Settings,
    accuracy,
    begin,
    cross_entropy,
    evaluate,
    make_plan,
    mean_grad,
    remaining,
    steps,
)
from pegrad.sampling import PoissonSampler, ShuffledSampler

SETTINGS = Settings(batch_size=8, epochs=1.0, lr=1e-2)
PRIVACY = Privacy(delta=1e-3, noise_multiplier=1.0, clip_norm=0.5)


def dataset() -> Dataset:
    """30 images of 8×8 whose class is where the bright row lies."""
    labels = torch.arange(40) % 3
    images = 0.1 * random.normal(random.key(5), (40, 1, 8, 8))
    images[torch.arange(40), 0, 2 * labels + 1] += 1
    return Dataset(images[:30], labels[:30], images[30:], labels[30:], "rows", 3)


DATA = dataset()


def test_a_private_plan_is_dp_sgd_on_poisson_batches():
    """Catches: a sum divided by the wrong constant, shuffled batches, settings that do not reach the step."""
    plan = make_plan(SETTINGS, PRIVACY, DATA)
    assert isinstance(plan.step, DPSGD)
    assert isinstance(plan.sampler, PoissonSampler)
    assert plan.sampler.num_examples == 30
    assert plan.sampler.expected_batch_size == pytest.approx(8)
    assert plan.step.clipped_grad.sensitivity == pytest.approx(0.5 / 8)
    assert (plan.noise_multiplier, plan.steps) == (1.0, 4)


def test_a_budget_sets_the_noise_and_is_spent_by_the_last_step_only():
    """Catches: noise calibrated to another number of steps, delta or rate; epsilon of the whole run all along."""
    plan = make_plan(SETTINGS, Privacy(delta=1e-3, epsilon=4.0), DATA)
    spent = [plan.epsilon(taken.state) for taken in steps(plan, DATA, random.key(0))]
    assert spent == sorted(set(spent))
    assert 3.99 < spent[-1] <= 4.0
    event = accounting.dp_event(plan.noise_multiplier, PoissonSampler(30, 8 / 30), plan.steps)
    assert spent[-1] == accounting.epsilon(event, 1e-3)


def test_a_plain_plan_shuffles_and_has_no_epsilon():
    plan = make_plan(SETTINGS, None, DATA)
    assert isinstance(plan.step, PlainSGD)
    assert plan.sampler == ShuffledSampler(30, 8)
    state = begin(plan, DATA, random.key(0)).state
    assert (plan.steps, plan.noise_multiplier, plan.epsilon(state), plan.clip_norm(state)) == (4, None, None, None)


@pytest.mark.parametrize(("epochs", "count"), [(1.0, 4), (0.01, 1), (2.0, 8), (2.6, 10)])
def test_epochs_are_rounded_up_to_steps(epochs, count):
    assert make_plan(Settings(8, epochs, 1e-3), None, DATA).steps == count


def test_every_step_is_the_plans_step_on_the_samplers_rows():
    """Catches: padding rows that count as examples, a key used twice, state or parameters that are not passed on."""
    plan, key = make_plan(SETTINGS, PRIVACY, DATA), random.key(7)
    init_key, sampler_key, state_key = random.split(key, 3)
    params = plan.model.init(init_key)
    state = plan.step.init(params, state_key)
    for index, taken in enumerate(steps(plan, DATA, key)):
        draw = plan.sampler(sampler_key, index)
        rows = draw.indices[draw.mask]
        params, state, metrics = plan.step(params, state, (DATA.train_images[rows], DATA.train_labels[rows]))
        assert taken.state.step == index + 1
        assert len(taken.metrics.norms) == draw.mask.sum()
        torch.testing.assert_close(taken.params, params, rtol=0, atol=0)
        torch.testing.assert_close(taken.metrics.losses, metrics.losses, rtol=0, atol=0)
    assert index + 1 == plan.steps


@pytest.mark.parametrize("privacy", [PRIVACY, None])
def test_one_key_one_run(privacy):
    """Catches: randomness that does not come from the key."""
    plan = make_plan(SETTINGS, privacy, DATA)

    def last(seed):
        *_, taken = steps(plan, DATA, random.key(seed))
        return taken.params["linear2"]["weight"]

    assert torch.equal(last(1), last(1))
    assert not torch.equal(last(1), last(2))


def test_a_plain_step_is_autograd_and_torch_adam():
    """Catches: a sum in place of the mean, an optimizer state that is not carried on.

    In float64: where a gradient is next to nothing, Adam makes a whole step of its rounding.
    """
    plan = make_plan(SETTINGS, None, DATA)
    params = trees.map(torch.Tensor.double, plan.model.init(random.key(0)))
    flat = [leaf.clone().requires_grad_() for layer in params.values() for leaf in layer.values()]
    theirs = {name: dict(zip(layer, [flat.pop(0) for _ in layer], strict=True)) for name, layer in params.items()}
    adam = torch.optim.Adam([leaf for layer in theirs.values() for leaf in layer.values()], lr=SETTINGS.lr)
    state = plan.step.init(params, random.key(1))
    batch = DATA.train_images[:8].double(), DATA.train_labels[:8]
    for _ in range(3):
        logits = torch.stack([plan.model.apply(theirs, image) for image in batch[0]])
        adam.zero_grad()
        F.cross_entropy(logits, batch[1]).backward()
        adam.step()
        params, state, metrics = plan.step(params, state, batch)
    torch.testing.assert_close(params, theirs, rtol=1e-6, atol=1e-9)
    assert metrics.losses.shape == (8,)
    assert metrics.norms.shape == (0,)


def test_a_plain_step_with_dropout_is_a_function_of_key_and_step():
    """Catches: dropout drawn from torch's own state in the run without privacy."""
    step = PlainSGD(lambda w, x: (w * F.dropout(x, 0.5)).sum(), make_plan(SETTINGS, None, DATA).step.optimizer)
    params, batch = torch.zeros(40), torch.ones(2, 40)
    state = step.init(params, random.key(1))
    before = torch.get_rng_state()
    first = step(params, state, batch).params
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(step(params, state, batch).params, first)
    assert not torch.equal(step(params, state._replace(step=1), batch).params, first)


def test_metrics_of_both_steps_have_a_mean_loss():
    for privacy in (PRIVACY, None):
        taken = next(steps(make_plan(SETTINGS, privacy, DATA), DATA, random.key(7)))
        torch.testing.assert_close(taken.metrics.mean_loss, taken.metrics.losses.mean())
        assert taken.metrics.mask.all()


def test_mean_grad_gives_each_examples_loss():
    grads, losses = mean_grad(lambda w, x: (w * x).square())(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
    assert grads == 20.0
    torch.testing.assert_close(losses, torch.tensor([4.0, 36.0]))


@pytest.mark.parametrize("privacy", [Privacy(delta=1e-3, noise_multiplier=0.0), None])
def test_training_learns(privacy):
    """Catches: updates of the wrong sign, labels that do not belong to their images."""
    plan = make_plan(Settings(batch_size=10, epochs=15, lr=1e-2), privacy, DATA)
    *_, last = steps(plan, DATA, random.key(0))
    evaluation = evaluate(plan, DATA, last)
    assert evaluation.step == 45
    assert evaluation.epsilon == (None if privacy is None else math.inf)
    assert evaluation.test_accuracy == 1.0


def test_accuracy_counts_every_image_once():
    """Catches: a mean over parts of different sizes, or the last part left out (2,550 is no multiple of a part)."""
    model = Model(lambda key: {}, lambda params, image: torch.cat([image, -image]))
    images = torch.ones(2550, 1)
    images[2001:] = -1
    assert accuracy(model, {}, images, torch.zeros(2550, dtype=torch.int64)) == 2001 / 2550


def test_cross_entropy_is_of_one_example():
    model = Model(lambda key: {}, lambda params, image: image)
    loss = cross_entropy(model)({}, (torch.tensor([0.0, math.log(3)]), torch.tensor(1)))
    torch.testing.assert_close(loss, torch.tensor(math.log(4 / 3)))


@pytest.mark.parametrize(("settings", "privacy"), PRESETS.values(), ids=PRESETS)
def test_the_presets_make_plans(settings, privacy):
    plan = make_plan(settings, privacy, DATA._replace(train_labels=torch.zeros(1000, dtype=torch.int64)))
    assert plan.noise_multiplier > 0


@pytest.mark.parametrize(("batch_size", "epochs"), [(31, 1), (0, 1), (8, 0), (8, math.nan)])
def test_settings_out_of_bounds_are_named(batch_size, epochs):
    with pytest.raises(ArgumentError, match=r"batch_size=(31|0)|epochs=(0|nan)"):
        make_plan(Settings(batch_size, epochs, 0.1), None, DATA)


@pytest.mark.parametrize("numbers", [{}, {"noise_multiplier": 1.0, "epsilon": 1.0}])
def test_noise_is_stated_once(numbers):
    with pytest.raises(ArgumentError, match="one of noise_multiplier and epsilon"):
        Privacy(delta=1e-5, **numbers)


def test_a_shuffled_plan_cannot_be_called_private():
    """Catches: an epsilon for batches that are not Poisson samples."""
    plan = make_plan(SETTINGS, PRIVACY, DATA)
    with pytest.raises(ArgumentError, match="Poisson"):
        replace(plan, sampler=ShuffledSampler(30, 8))
    step = replace(plan.step, sampler=ShuffledSampler(30, 8))
    shuffled = replace(plan, step=step, sampler=step.sampler)
    *_, last = steps(shuffled, DATA, random.key(0))
    with pytest.raises(ArgumentError, match="Shuffled"):
        shuffled.epsilon(last.state)


def test_the_learning_rate_reaches_the_optimizer():
    """Catches: a setting that is ignored: Adam's first update is the learning rate itself."""
    step = make_plan(Settings(8, 1, 0.25), None, DATA).step
    grads = {"w": torch.ones(3)}
    assert isinstance(step, PlainSGD)
    updates, _ = step.optimizer.update(grads, step.optimizer.init(grads), grads)
    torch.testing.assert_close(updates["w"], torch.full((3,), -0.25))


def test_a_run_may_be_clipped_by_layers_and_drawn():
    """Catches: norms by groups joined as if they were examples, in the loop's records or its picture."""
    privacy = replace(PRIVACY, clip_norm=PerLayer(0.5))
    plan = make_plan(SETTINGS, privacy, DATA)
    assert plan.step.clipped_grad.sensitivity == pytest.approx(0.5 / 8)
    taken = list(steps(plan, DATA, random.key(7)))
    groups = plan.step.clipped_grad.groups(taken[0].params)
    for step in taken:
        assert step.metrics.norms.shape == (len(groups), len(step.metrics.mask))
        assert step.metrics.whole_norms.shape == step.metrics.mask.shape
    history = [evaluate(plan, DATA, taken[-1])]
    plots.private_training(history, [step.metrics.whole_norms for step in taken], 0.5, "by layers")


def clipped_by(name):
    """Return how to train with a clipping of the command line; None: without privacy."""
    if name is None:
        return None
    return replace(PRIVACY, noise_multiplier=0.5, clip_norm=CLIPPINGS[name](0.5, SETTINGS.batch_size))


_COSTLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("per_layer", "automatic")]


@pytest.mark.parametrize("name", ["flat", "adaptive", None, *_COSTLY])
def test_the_rest_of_a_run_is_that_of_the_whole(name):
    """Catches: steps replayed or left out, fresh noise for a batch drawn before, bounds or a ledger that begin anew."""
    key, privacy = random.key(3), clipped_by(name)
    plan = make_plan(SETTINGS, privacy, DATA)
    whole = list(steps(plan, DATA, key))
    for done in (1, 3, 4):
        file = io.BytesIO()
        past = begin(plan, DATA, key)._replace(params=whole[done - 1].params, state=whole[done - 1].state)
        torch.save(past, file)
        file.seek(0)
        rest = list(remaining(make_plan(SETTINGS, privacy, DATA), DATA, torch.load(file, weights_only=True)))
        assert len(rest) == plan.steps - done
        for ours, theirs in zip(rest, whole[done:], strict=True):
            torch.testing.assert_close(ours.params, theirs.params, rtol=0, atol=0)
            assert torch.equal(ours.state.key, theirs.state.key)
            torch.testing.assert_close(ours.state.optimizer, theirs.state.optimizer, rtol=0, atol=0)
            assert (ours.state.step, ours.state.bounds) == (theirs.state.step, theirs.state.bounds)
            assert ours.state.ledger == theirs.state.ledger
            assert plan.epsilon(ours.state) == plan.epsilon(theirs.state)


@pytest.mark.parametrize("name", CLIPPINGS)
def test_every_clipping_costs_what_its_noise_does(name):
    """Catches: counts that are not paid for, or paid for twice; a clip norm that is shown as it was at first."""
    plan = make_plan(SETTINGS, clipped_by(name), DATA)
    *_, last = steps(plan, DATA, random.key(3))
    evaluation = evaluate(plan, DATA, last)
    expected = accounting.epsilon(accounting.dp_event(0.5, PoissonSampler(30, 8 / 30), 4), PRIVACY.delta)
    assert evaluation.epsilon == pytest.approx(expected, rel=1e-9)
    assert (evaluation.clip_norm == 0.5) == (name != "adaptive")
    if name == "adaptive":
        assert (evaluation.clip_norm,) == last.state.bounds
