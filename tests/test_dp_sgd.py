"""The step: what noise it adds, that it is stateless, and that other people's optimizers fit."""

import io
import re
import weakref

import pytest
import torch
import torchopt
from scipy import stats
from torchopt.base import EmptyState
from torchopt.transform.scale_by_adam import ScaleByAdamState

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
    noise = pegrad.add_noise(random.key(5), grads, 0.3, step=0)
    for leaf in noise.values():
        assert stats.kstest(leaf.flatten().numpy() / 0.3, "norm").pvalue > 1e-3
        assert stats.kstest(leaf.flatten().numpy() / 0.2, "norm").pvalue < 1e-6
        assert stats.kstest(leaf.flatten().numpy() / 0.45, "norm").pvalue < 1e-6
    none = pegrad.add_noise(random.key(5), grads, 0.0, step=0)
    assert all(a is b for a, b in zip(none.values(), grads.values(), strict=True))


def test_a_loop_with_one_key_adds_fresh_noise_each_step():
    """Catches: the obvious loop, one key for all steps, that adds the same noise at every step."""
    grads, key = {"x": torch.zeros(1000, dtype=torch.float64)}, random.key(5)
    noise = [pegrad.add_noise(key, grads, 1.0, step=step)["x"] for step in range(4)]
    assert len(torch.cat(noise).unique()) == 4000
    assert torch.equal(pegrad.add_noise(key, grads, 1.0, step=2)["x"], noise[2])
    with pytest.raises(TypeError, match="step"):
        pegrad.add_noise(key, grads, 1.0)
    for wrong in (-1, 0.5):
        with pytest.raises(pegrad.ArgumentError, match="data"):
            pegrad.add_noise(key, grads, 1.0, step=wrong)


def test_the_step_by_hand_is_the_step():
    """Catches: noise of the composed step that is not that of its parts."""
    step = make()
    state = step.init(PARAMS, random.key(1))._replace(step=7)
    out = step(PARAMS, state, BATCH)
    clipped = step.clipped_grad(PARAMS, BATCH)
    noisy = pegrad.add_noise(state.key, clipped.grads, 1.3 * step.clipped_grad.sensitivity, step=7)
    assert torch.equal(out.params["a"], PARAMS["a"] - noisy["a"])


def test_noise_makes_no_second_copy_of_the_model(monkeypatch):
    """Catches: clean gradients that stay until the last noisy one is made."""
    clean: list[weakref.ref] = []
    alive: list[int] = []
    draw, clip = random.leaves.normal_slice_from, ClippedGrad.finish

    def clip_and_watch(*args):
        clipped = clip(*args)
        clean.extend(weakref.ref(leaf) for leaf in clipped.values())
        return clipped

    def draw_and_count(*args, **kwargs):
        alive.append(sum(leaf() is not None for leaf in clean))
        return draw(*args, **kwargs)

    monkeypatch.setattr(ClippedGrad, "finish", clip_and_watch)
    monkeypatch.setattr(random.leaves, "normal_slice_from", draw_and_count)
    monkeypatch.setattr(random.aes, "TOGETHER", 0)
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
    torch.save((params, state), file)
    file.seek(0)
    with torch.serialization.safe_globals([ScaleByAdamState, EmptyState]):  # TorchOpt's own
        params, state = torch.load(file)
    assert type(state) is pegrad.State
    resumed, _ = run(params, state, 3)
    straight, _ = run(PARAMS, step.init(PARAMS, random.key(3)), 6)
    assert all(torch.equal(resumed[k], straight[k]) for k in PARAMS)


def test_a_pair_of_ones_own_and_torchopt_agree_with_ours():
    """Catches: an optimizer called with the wrong arguments, or one that writes over the gradients."""

    class Plain:
        init = staticmethod(lambda params: None)
        update = staticmethod(lambda grads, state, params: ({k: -0.1 * g for k, g in grads.items()}, state))

    results = []
    for optimizer in (optim.sgd(0.1), Plain, torchopt.sgd(0.1), (Plain.init, Plain.update)):
        step = make(optimizer=optimizer)
        results.append(step(PARAMS, step.init(PARAMS, random.key(0)), BATCH).params["a"])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert torch.equal(results[1], results[3])


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


def test_a_loaded_step_is_what_was_saved():
    """Catches: types that torch.load refuses by default, and those that come back as others."""
    step = make(optimizer=optim.adam(1e-2))
    saved = step(PARAMS, step.init(PARAMS, random.key(3)), BATCH)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file)
    assert trees.flatten(loaded)[1] == trees.flatten(saved)[1]
    for ours, theirs in zip(trees.leaves(loaded), trees.leaves(saved), strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert torch.utils._pytree.tree_structure(loaded) == torch.utils._pytree.tree_structure(saved)


@pytest.mark.parametrize("plain", [False, True])
def test_no_state_and_no_step_prints_its_key(plain):
    """Catches: a log of a step that gives the noise away; also with a key that is a plain tensor."""
    step = make(optimizer=optim.sgd(0.1, momentum=0.9))
    key = random.key(3)
    if plain:
        key = torch.tensor(key.tolist(), dtype=torch.uint8)
    params = {"a": torch.zeros(4), "b": torch.zeros(3)}
    state = step.init(params, key)
    taken = step(params, state, torch.ones(2, 4))
    for each in (state, taken.state, taken, [taken], {"state": state}):
        for shown in (repr(each), str(each), f"{each}"):
            assert "key=key(…)" in shown
            assert str(key.tolist()[:3])[1:-1] not in re.sub(r"\s+", " ", shown)
            assert "uint8" not in shown
    assert "optimizer=" in repr(state)


def dropout_loss(params, x):
    return (params["a"] * torch.nn.functional.dropout(x, 0.5)).sum() + params["b"].sum() * 0


@pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_dropout_is_a_function_of_key_and_step(strategy, microbatch_size):
    """Catches: dropout drawn from torch's own state: other bits for the same arguments, and a generator moved on."""
    step = pegrad.dp_sgd(
        dropout_loss,
        optim.sgd(1.0),
        clip_norm=1e3,
        noise_multiplier=0.0,
        expected_batch_size=1,
        strategy=strategy,
        microbatch_size=microbatch_size,
    )
    params, batch = {"a": torch.zeros(40), "b": torch.zeros(3)}, torch.ones(4, 40)
    state = step.init(params, random.key(1))
    before = torch.get_rng_state()
    first = step(params, state, batch).params["a"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(step(params, state, batch).params["a"], first)
    assert not torch.equal(step(params, state._replace(step=1), batch).params["a"], first)
    assert not torch.equal(step(params, state._replace(key=random.key(2)), batch).params["a"], first)
    # Four examples, each with a mask of its own: sums of 0 to 4 doubled ones, not 0 or 4 alone.
    assert set((-first / 2).tolist()) - {0.0, 4.0}


def test_metrics_leave_padding_out():
    """Catches: a mean loss over padding, and aux of padding rows that looks like that of examples."""

    def with_aux(params, x):
        return (params["a"] * x).sum(), {"x": x, "big": x.sum() > 0, "whole": x.sum().long() + 1}

    step = pegrad.dp_sgd(with_aux, optim.sgd(1.0), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=1)
    params = {"a": torch.ones(3)}
    state = step.init(params, random.key(1))
    batch, mask = torch.arange(12.0).view(4, 3), torch.tensor([True, False, True, False])
    metrics = step(params, state, batch, mask).metrics
    assert metrics.mask.tolist() == mask.tolist()
    assert metrics.mean_loss == (batch[0].sum() + batch[2].sum()) / 2
    assert metrics.aux["x"].tolist() == (batch * mask[:, None]).tolist()
    assert metrics.aux["big"].tolist() == [True, False, True, False]
    assert metrics.aux["whole"].tolist() == [4, 0, 22, 0]
    whole = step(params, state, batch).metrics
    assert whole.mask.tolist() == [True] * 4
    assert whole.mean_loss == batch.sum() / 4
    for empty in (step(params, state, batch[:0]), step(params, state, batch, torch.zeros(4, dtype=torch.bool))):
        assert empty.metrics.mean_loss.isnan()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
def test_aux_of_any_dtype_takes_a_mask(dtype):
    """Catches: padding set to zero by an operation that some dtypes lack, or that changes the dtype."""

    def with_aux(params, x):
        return (params * x).sum(), x.to(dtype)

    out = pegrad.clipped_grad(with_aux, clip_norm=1.0)(torch.ones(2), torch.ones(2, 2), torch.tensor([True, False]))
    assert out.aux.dtype == dtype
    assert out.aux.to(torch.complex64).real.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_that_is_not_finite_leaves_no_trace(value):
    """Catches: padding that is multiplied by zero in place of being set to it."""

    def with_aux(params, x):
        return (params["a"] * x).sum(), x

    step = pegrad.dp_sgd(with_aux, optim.sgd(1.0), clip_norm=1.0, noise_multiplier=0.0, expected_batch_size=1)
    params = {"a": torch.ones(3)}
    batch = torch.stack([torch.ones(3), torch.full((3,), value)])
    out = step(params, step.init(params, random.key(1)), batch, torch.tensor([True, False]))
    assert out.metrics.mean_loss == 3
    assert out.metrics.aux[1].tolist() == [0, 0, 0]
    assert out.metrics.non_finite == 0
    assert out.params["a"].isfinite().all()


def test_a_mask_that_is_no_tensor_is_refused():
    """Catches: a raw AttributeError."""
    step = make()
    with pytest.raises(pegrad.LeafError, match="mask is of type list"):
        step(PARAMS, step.init(PARAMS, random.key(1)), BATCH, [True] * 4)
