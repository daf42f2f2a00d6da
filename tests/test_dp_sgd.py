"""The step: what noise it adds, that it is stateless, and that other people's optimizers fit."""

import io
import weakref

import pytest
import torch
import torchopt
from scipy import stats

import pegrad
from pegrad import optim, random, trees
from pegrad.per_example import ClippedGrad

SIZE = 20_000
CLIP = 0.5


def loss(params, x):
    return (params["a"] * x).sum() + (params["b"] * x[:3]).sum() * 0


def make(**changes):
    arguments = {"clip_norm": CLIP, "noise_multiplier": 1.3, "expected_batch_size": 4}
    return pegrad.dp_sgd(loss, changes.pop("optimizer", optim.sgd(1.0)), **(arguments | changes))


PARAMS = {"a": torch.zeros(SIZE), "b": torch.zeros(3)}
BATCH = torch.ones(4, SIZE) / SIZE**0.5


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
@pytest.mark.parametrize("expected_batch_size", [1, 4, 32.5])
def test_step_adds_noise_of_the_stated_law(microbatch_size, expected_batch_size):
    """Catches: noise from a raw clip norm, once per micro-batch, or scaled by the batch's own size."""
    step = make(microbatch_size=microbatch_size, expected_batch_size=expected_batch_size)
    out = step(PARAMS, step.init(PARAMS, random.key(1)), BATCH)
    clean = step.clipped_grad(PARAMS, BATCH).grads["a"]
    noise = -out.params["a"].double() - clean.double()
    std = 1.3 * CLIP / expected_batch_size
    assert stats.kstest(noise.numpy() / std, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise.numpy() / (std * wrong), "norm").pvalue < 1e-6


def test_noise_follows_the_stated_law():
    """Catches: variance taken for standard deviation; noise that is the same for every leaf."""
    grads = {"x": torch.zeros(SIZE), "y": torch.zeros(100, 200, dtype=torch.float64)}
    noise = pegrad.add_noise(random.key(5), grads, 0.3)
    for leaf in noise.values():
        assert stats.kstest(leaf.flatten().numpy() / 0.3, "norm").pvalue > 1e-3
        assert stats.kstest(leaf.flatten().numpy() / 0.2, "norm").pvalue < 1e-6
        assert stats.kstest(leaf.flatten().numpy() / 0.45, "norm").pvalue < 1e-6
    assert all(
        a is b for a, b in zip(pegrad.add_noise(random.key(5), grads, 0.0).values(), grads.values(), strict=True)
    )


def test_noise_makes_no_second_copy_of_the_model(monkeypatch):
    """Catches: clean gradients that stay until the last noisy one is made."""
    clean: list[weakref.ref] = []
    alive: list[int] = []
    draw, clip = random.normal, ClippedGrad.__call__

    def clip_and_watch(*args):
        clipped = clip(*args)
        clean.extend(weakref.ref(leaf) for leaf in clipped.grads.values())
        return clipped

    def draw_and_count(*args, **kwargs):
        alive.append(sum(leaf() is not None for leaf in clean))
        return draw(*args, **kwargs)

    monkeypatch.setattr(ClippedGrad, "__call__", clip_and_watch)
    monkeypatch.setattr(random, "normal", draw_and_count)
    step = make()
    step(PARAMS, step.init(PARAMS, random.key(1)), BATCH)
    assert alive == [2, 1]


def test_noisy_gradients_are_gone_when_parameters_are_made(monkeypatch):
    """Catches: gradients, updates and new parameters held at once."""
    noisy: list[weakref.ref] = []
    alive: list[int] = []
    each_leaf = trees.map

    def update(grads, state, params):
        noisy.extend(weakref.ref(leaf) for leaf in grads.values())
        return {name: -grad for name, grad in grads.items()}, state

    def map_and_count(*args):
        alive.append(sum(leaf() is not None for leaf in noisy))
        return each_leaf(*args)

    step = make(optimizer=optim.GradientTransformation(lambda params: (), update))
    state = step.init(PARAMS, random.key(1))
    monkeypatch.setattr(trees, "map", map_and_count)
    step(PARAMS, state, BATCH)
    assert len(noisy) == 2
    assert alive[-1] == 0


def test_no_value_is_shared_by_leaves_steps_or_keys():
    """Catches: one keystream used twice."""
    step = make(noise_multiplier=1.0)
    params = {"a": torch.zeros(SIZE, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    empty = torch.zeros(0, SIZE, dtype=torch.float64)
    seen: set[float] = set()
    total = 0
    for seed in (0, 1):
        state = step.init(params, random.key(seed))
        for _ in range(2):
            updated, state, _ = step(params, state, empty)
            values = torch.cat([updated["a"], updated["b"]]).tolist()
            seen |= set(values)
            total += len(values)
    assert len(seen) == total


def test_same_arguments_same_result_and_nothing_is_changed():
    """Catches: an in-place update, a counter kept outside the state."""
    step = make(optimizer=optim.adam(1e-2))
    state = step.init(PARAMS, random.key(0))
    before = [
        leaf.clone() for leaf in torch.utils._pytree.tree_leaves((PARAMS, state)) if isinstance(leaf, torch.Tensor)
    ]
    first, second = step(PARAMS, state, BATCH), step(PARAMS, state, BATCH)
    after = [leaf for leaf in torch.utils._pytree.tree_leaves((PARAMS, state)) if isinstance(leaf, torch.Tensor)]
    assert all(map(torch.equal, before, after))
    assert all(torch.equal(first.params[k], second.params[k]) for k in PARAMS)
    assert not first.params["a"].requires_grad


@pytest.mark.parametrize("optimizer", [optim.sgd(0.1, momentum=0.9), optim.adam(1e-2), torchopt.adamw(1e-2)])
def test_resuming_from_a_file_is_as_if_never_stopped(optimizer):
    """Catches: state that is not saved, or noise that depends on the process."""
    step = make(optimizer=optimizer)

    def run(params, state, steps):
        for _ in range(steps):
            params, state, _ = step(params, state, BATCH)
        return params, state

    params, state = run(PARAMS, step.init(PARAMS, random.key(3)), 3)
    file = io.BytesIO()
    torch.save((params, tuple(state)), file)
    file.seek(0)
    params, state = torch.load(file, weights_only=False)
    resumed, _ = run(params, pegrad.State(*state), 3)
    straight, _ = run(PARAMS, step.init(PARAMS, random.key(3)), 6)
    assert all(torch.equal(resumed[k], straight[k]) for k in PARAMS)


def test_a_pair_of_ones_own_and_torchopt_agree_with_ours():
    """Catches: an optimizer called with the wrong arguments, or one that writes over the gradients."""

    class Plain:
        init = staticmethod(lambda params: None)
        update = staticmethod(lambda grads, state, params: ({k: -0.1 * g for k, g in grads.items()}, state))

    results = []
    for optimizer in (optim.sgd(0.1), Plain, torchopt.sgd(0.1)):
        step = make(optimizer=optimizer)
        results.append(step(PARAMS, step.init(PARAMS, random.key(0)), BATCH).params["a"])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_parameters_keep_their_dtype_and_structure():
    """Catches: float32 noise that turns half-precision parameters to float32."""
    params = {"a": torch.zeros(8, dtype=torch.bfloat16), "b": torch.zeros(3, dtype=torch.bfloat16)}
    step = make()
    out = step(params, step.init(params, random.key(0)), torch.ones(4, 8, dtype=torch.bfloat16))
    assert {k: v.dtype for k, v in out.params.items()} == {"a": torch.bfloat16, "b": torch.bfloat16}
    assert out.state.step == 1


def test_the_divisor_is_the_public_constant():
    """Catches: division by the number of rows given, or of rows that the mask leaves."""
    step = make(noise_multiplier=0.0, clip_norm=1e6, expected_batch_size=10)
    mask = torch.tensor([True, True, False, False])
    out = step(PARAMS, step.init(PARAMS, random.key(0)), BATCH, mask)
    torch.testing.assert_close(out.params["a"], -BATCH[:2].sum(0) / 10)
