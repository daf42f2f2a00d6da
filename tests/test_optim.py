"""One table of optimizers and invariants: each row says what `torch.optim` calls the same thing."""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from pegrad import optim, trees
from pegrad.errors import ArgumentError
from pegrad.optim import GradientTransformation

COSINE = optim.linear_warmup(optim.cosine_decay(0.1, steps=30, final=0.01), steps=5)


class Row(NamedTuple):
    """An optimizer of ours, torch's, and the learning rate to give both."""

    ours: Callable[..., GradientTransformation]
    theirs: type[torch.optim.Optimizer]
    options: dict
    their_options: dict
    rate: float | optim.Schedule = 0.1


ADAM_OPTIONS = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3}
TORCH_ADAM_OPTIONS = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}

ROWS = {
    "sgd": Row(optim.sgd, torch.optim.SGD, {}, {}),
    "sgd momentum": Row(optim.sgd, torch.optim.SGD, *[{"momentum": 0.7}] * 2),
    "sgd nesterov": Row(optim.sgd, torch.optim.SGD, *[{"momentum": 0.7, "nesterov": True}] * 2),
    "sgd decay": Row(optim.sgd, torch.optim.SGD, *[{"weight_decay": 0.2}] * 2),
    "sgd all": Row(
        optim.sgd,
        torch.optim.SGD,
        *[{"momentum": 0.5, "nesterov": True, "weight_decay": 0.2}] * 2,
        rate=COSINE,
    ),
    "adam": Row(optim.adam, torch.optim.Adam, {}, {}),
    "adam all": Row(optim.adam, torch.optim.Adam, ADAM_OPTIONS, TORCH_ADAM_OPTIONS),
    "adam schedule": Row(optim.adam, torch.optim.Adam, ADAM_OPTIONS, TORCH_ADAM_OPTIONS, COSINE),
    "adamw": Row(optim.adamw, torch.optim.AdamW, {}, {}),
    "adamw all": Row(optim.adamw, torch.optim.AdamW, ADAM_OPTIONS, TORCH_ADAM_OPTIONS),
    "adamw schedule": Row(optim.adamw, torch.optim.AdamW, ADAM_OPTIONS, TORCH_ADAM_OPTIONS, COSINE),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


def make_params(dtype: torch.dtype = torch.float64) -> dict:
    """A tree with a NamedTuple, a list, a None, a scalar and a leaf without elements."""
    generator = torch.Generator().manual_seed(0)
    return {
        "layers": [Layer(torch.randn(3, 2, generator=generator, dtype=torch.float64).to(dtype), None)],
        "scale": torch.tensor(0.5, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }


def make_grads(params: dict, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def grad(leaf: torch.Tensor) -> torch.Tensor:
        return (leaf + torch.randn(leaf.shape, generator=generator, dtype=torch.float64)).to(leaf.dtype)

    return trees.map(grad, params)


def build(row: Row) -> GradientTransformation:
    return row.ours(row.rate, **row.options)


def run(row: Row, params: dict, steps: int) -> tuple[dict, object]:
    optimizer = build(row)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(make_grads(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def run_torch(row: Row, params: dict, steps: int) -> dict:
    leaves, spec = trees.flatten(params)
    leaves = [leaf.clone() for leaf in leaves]
    schedule = row.rate if callable(row.rate) else optim.constant(row.rate)
    optimizer = row.theirs(leaves, lr=1.0, **row.their_options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        grads = trees.leaves(make_grads(trees.unflatten(spec, leaves), step))
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        optimizer.step()
        scheduler.step()
    return trees.unflatten(spec, leaves)


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in trees.leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_same(left: object, right: object) -> None:
    """Equal to the bit, in structure, dtype, shape and value."""
    assert trees.flatten(left)[1] == trees.flatten(right)[1]
    torch.testing.assert_close(trees.leaves(left), trees.leaves(right), rtol=0, atol=0)


@every_row
def test_equals_torch(row: Row) -> None:
    """Catches: a term dropped or out of order, such as the bias correction, or a decay after the moments."""
    params = make_params()
    ours, theirs = run(row, params, 50)[0], run_torch(row, params, 50)
    torch.testing.assert_close(trees.leaves(ours), trees.leaves(theirs), rtol=1e-12, atol=1e-12)


@every_row
def test_equals_torch_in_float32(row: Row) -> None:
    """Catches: a moment kept or divided in a narrower type than the parameters'."""
    params = make_params(torch.float32)
    ours, theirs = run(row, params, 50)[0], run_torch(row, params, 50)
    torch.testing.assert_close(trees.leaves(ours), trees.leaves(theirs), rtol=1e-4, atol=1e-5)


@every_row
def test_minimises_a_quadratic(row: Row) -> None:
    """Catches: an update with the wrong sign. Decay would move the minimum, so it is off."""
    optimizer = row.ours(optim.cosine_decay(0.1, steps=300), **(row.options | {"weight_decay": 0}))
    target = make_params()
    params = trees.map(torch.zeros_like, target)
    state = optimizer.init(params)
    for _ in range(300):
        grads = trees.map(torch.sub, params, target)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    torch.testing.assert_close(tensors(params), tensors(target), rtol=0, atol=5e-3)


@every_dtype
@every_row
def test_keeps_structure_shape_and_dtype(row: Row, dtype: torch.dtype) -> None:
    """Catches: a state that changes type at the first step (which breaks compiled and resumed loops)."""
    params = make_params(dtype)
    optimizer = build(row)
    state = optimizer.init(params)
    updates, next_state = optimizer.update(make_grads(params, 0), state, params)
    next_params = optim.apply_updates(params, updates)
    for before, after in ((params, updates), (params, next_params), (state, next_state)):
        assert trees.flatten(before)[1] == trees.flatten(after)[1]
        assert [type(leaf) for leaf in trees.leaves(before)] == [type(leaf) for leaf in trees.leaves(after)]
        assert [(leaf.shape, leaf.dtype) for leaf in tensors(before)] == [
            (leaf.shape, leaf.dtype) for leaf in tensors(after)
        ]


@every_row
def test_is_pure(row: Row) -> None:
    """Catches: an in-place operation on gradients, parameters or state; a hidden step counter."""
    params, state = run(row, make_params(), 3)
    grads = make_grads(params, 3)
    kept = trees.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (grads, state, params))
    optimizer = build(row)
    first = optimizer.update(grads, state, params)
    optim.apply_updates(params, first[0])
    assert_same((grads, state, params), kept)
    assert_same(optimizer.update(grads, state, params), first)


@every_row
def test_state_survives_saving(row: Row) -> None:
    """Catches: a state that holds a function or any other thing that does not pickle."""
    state = run(row, make_params(), 2)[1]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([Layer, optim.AdamState]):
        assert_same(torch.load(file), state)


@every_row
def test_zero_rate_moves_nothing(row: Row) -> None:
    """Catches: a decay that escapes the learning rate."""
    params = make_params()
    optimizer = row.ours(0.0, **row.options)
    updates, _ = optimizer.update(make_grads(params, 0), optimizer.init(params), params)
    assert all(not update.any() for update in tensors(updates))


def test_a_chain_feeds_each_link_with_the_one_before() -> None:
    """Catches: links applied in the reverse order."""
    params, grads = {"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}
    decay_last = optim.chain(optim.scale_by_learning_rate(0.5), optim.add_decayed_weights(0.25))
    updates, state = decay_last.update(grads, decay_last.init(params), params)
    assert updates["w"].item() == -0.5 + 0.25 * 2.0
    assert state == (1, ())
    assert optim.chain().update(grads, (), params) == (grads, ())


def test_cosine_decay_is_the_published_curve() -> None:
    """Catches: degrees for radians, or a curve that rises again after its end."""
    ours = optim.cosine_decay(0.3, steps=20, final=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(21):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert ours(21) == ours(1000) == pytest.approx(0.1)


def test_warmup_rises_then_hands_over() -> None:
    """Catches: a first step of zero, a peak reached twice, a decay that started during the rise."""
    decay = optim.cosine_decay(1.0, steps=10)
    schedule = optim.linear_warmup(decay, steps=4)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [schedule(4 + step) for step in range(20)] == [decay(step) for step in range(20)]
    assert optim.linear_warmup(0.5, steps=0)(0) == 0.5


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("build", "name", "values"),
    [
        (optim.sgd, "learning_rate", [-1, NAN, INF]),
        (optim.constant, "learning_rate", [-1, NAN, INF]),
        (lambda v: optim.linear_warmup(v, 3), "learning_rate", [-1, NAN, INF]),
        (lambda v: optim.sgd(1, momentum=v), "momentum", [-0.1, 1, NAN]),
        (lambda v: optim.sgd(1, momentum=v, nesterov=True), "momentum", [0]),
        (lambda v: optim.sgd(1, weight_decay=v), "weight_decay", [-0.1, NAN, INF]),
        (lambda v: optim.adam(1, weight_decay=v), "weight_decay", [-0.1, NAN, INF]),
        (lambda v: optim.adamw(1, weight_decay=v), "weight_decay", [-0.1, NAN, INF]),
        (lambda v: optim.adam(1, b1=v), "b1", [-0.1, 1, NAN]),
        (lambda v: optim.adam(1, b2=v), "b2", [-0.1, 1, NAN]),
        (lambda v: optim.adamw(1, eps=v), "eps", [-1e-8, 0, NAN, INF]),
        (lambda v: optim.cosine_decay(v, 3), "peak", [-1, NAN, INF]),
        (lambda v: optim.cosine_decay(1, 3, final=v), "final", [-1, NAN, INF]),
        (lambda v: optim.cosine_decay(1, v), "steps", [0, -1]),
        (lambda v: optim.linear_warmup(1, v), "steps", [-1]),
    ],
)
def test_bad_hyper_parameters_are_named(build: Callable, name: str, values: list[float]) -> None:
    """Catches: a bound that is missing, or a message that hides the argument or its value."""
    for value in values:
        with pytest.raises(ArgumentError, match=rf"{name}={value}"):
            build(value)


def test_a_schedule_is_checked_when_it_is_used() -> None:
    """Catches: an ascent, or NaN parameters, from a schedule that leaves its bounds."""
    params = {"w": torch.ones(1)}
    optimizer = optim.sgd(lambda step: 1.0 - step)
    _, state = optimizer.update(params, optimizer.init(params), params)
    _, state = optimizer.update(params, state, params)
    with pytest.raises(ArgumentError, match=r"learning_rate=-1\.0"):
        optimizer.update(params, state, params)
