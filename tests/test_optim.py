"""One table of optimizers and invariants: each row says what `torch.optim` calls the same thing."""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from pegrad import optim, trees
from pegrad.errors import ArgumentError, LeafError
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
LABELS = {"layers": "slow", "scale": "fast", "empty": "slow"}
MASK = {"layers": [True], "scale": False, "empty": True}
OTHERS = {
    "partition": optim.partition({"slow": optim.sgd(0.1, momentum=0.7), "fast": optim.adam(0.1)}, LABELS),
    "masked": optim.masked(optim.adam(0.1), MASK),
    "adamw with a mask": optim.adamw(0.1, mask=MASK),
    "scheduled decay": optim.sgd(0.1, weight_decay=optim.linear_decay(0.2, steps=2), mask=MASK),
    "average": optim.chain(optim.sgd(0.1), optim.average_iterates(0.9)),
    "clip": optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.1)),
    "plain pairs": optim.chain(tuple(optim.adam(0.1)), optim.masked(tuple(optim.sgd(0.1)), MASK)),
}
every_optimizer = pytest.mark.parametrize(
    "optimizer", [*(row.ours(row.rate, **row.options) for row in ROWS.values()), *OTHERS.values()], ids=[*ROWS, *OTHERS]
)
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


def run(optimizer: GradientTransformation, params: dict, steps: int) -> tuple[dict, object]:
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(make_grads(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def torch_leaves(tree: dict) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in trees.leaves(tree)]


def step_torch(optimizer: torch.optim.Optimizer, leaves: list[torch.Tensor], like: dict, seed: int) -> None:
    """Take a step by the gradients that ours would be given."""
    grads = make_grads(trees.unflatten(trees.flatten(like)[1], leaves), seed)
    for leaf, grad in zip(leaves, trees.leaves(grads), strict=True):
        leaf.grad = grad
    optimizer.step()


def run_torch(row: Row, params: dict, steps: int) -> dict:
    leaves = torch_leaves(params)
    schedule = row.rate if callable(row.rate) else optim.constant(row.rate)
    optimizer = row.theirs(leaves, lr=1.0, **row.their_options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        step_torch(optimizer, leaves, params, step)
        scheduler.step()
    return trees.unflatten(trees.flatten(params)[1], leaves)


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
    ours, theirs = run(build(row), params, 50)[0], run_torch(row, params, 50)
    torch.testing.assert_close(trees.leaves(ours), trees.leaves(theirs), rtol=1e-12, atol=1e-12)


@every_row
def test_equals_torch_in_float32(row: Row) -> None:
    """Catches: a moment kept or divided in a narrower type than the parameters'."""
    params = make_params(torch.float32)
    ours, theirs = run(build(row), params, 50)[0], run_torch(row, params, 50)
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
@every_optimizer
def test_keeps_structure_shape_and_dtype(optimizer: GradientTransformation, dtype: torch.dtype) -> None:
    """Catches: a state that changes type at the first step (which breaks compiled and resumed loops)."""
    params = make_params(dtype)
    state = optimizer.init(params)
    updates, next_state = optimizer.update(make_grads(params, 0), state, params)
    next_params = optim.apply_updates(params, updates)
    for before, after in ((params, updates), (params, next_params), (state, next_state)):
        assert trees.flatten(before)[1] == trees.flatten(after)[1]
        assert [type(leaf) for leaf in trees.leaves(before)] == [type(leaf) for leaf in trees.leaves(after)]
        assert [(leaf.shape, leaf.dtype) for leaf in tensors(before)] == [
            (leaf.shape, leaf.dtype) for leaf in tensors(after)
        ]


@every_optimizer
def test_is_pure(optimizer: GradientTransformation) -> None:
    """Catches: an in-place operation on gradients, parameters or state; a hidden step counter."""
    params, state = run(optimizer, make_params(), 3)
    grads = make_grads(params, 3)
    kept = trees.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (grads, state, params))
    first = optimizer.update(grads, state, params)
    optim.apply_updates(params, first[0])
    assert_same((grads, state, params), kept)
    assert_same(optimizer.update(grads, state, params), first)


@every_optimizer
def test_state_survives_saving(optimizer: GradientTransformation) -> None:
    """Catches: a state that holds a function or any other thing that does not pickle."""
    state = run(optimizer, make_params(), 2)[1]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([Layer]):
        assert_same(torch.load(file, weights_only=True), state)


@every_row
def test_zero_rate_moves_nothing(row: Row) -> None:
    """Catches: a decay that escapes the learning rate."""
    params = make_params()
    optimizer = row.ours(0.0, **row.options)
    updates, _ = optimizer.update(make_grads(params, 0), optimizer.init(params), params)
    assert all(not update.any() for update in tensors(updates))


# Groups of parameters


def test_groups_equal_torchs() -> None:
    """Catches: a group that gets another's optimizer, or leaves put back in another order."""
    params = make_params()
    groups = {"slow": optim.adamw(0.01, weight_decay=0.3), "fast": optim.adamw(0.1, weight_decay=0.0, b1=0.5)}
    ours, _ = run(optim.partition(groups, LABELS), params, 30)
    leaves = torch_leaves(params)
    names = [LABELS[path.split("'")[1]] for path in trees.paths(params)]
    slow, fast = ([leaf for leaf, name in zip(leaves, names, strict=True) if name == which] for which in groups)
    theirs = torch.optim.AdamW(
        [
            {"params": slow, "lr": 0.01, "weight_decay": 0.3},
            {"params": fast, "lr": 0.1, "weight_decay": 0.0, "betas": (0.5, 0.999)},
        ]
    )
    for step in range(30):
        step_torch(theirs, leaves, params, step)
    torch.testing.assert_close(trees.leaves(ours), leaves, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.3, optim.linear_decay(0.3, steps=20)])
def test_a_mask_of_decay_equals_a_group_of_torchs(decay: float | optim.Schedule) -> None:
    """Catches: a mask that is turned round, that takes the gradient away too, or a schedule that stands still."""
    params = make_params()
    mask = {"layers": False, "scale": True, "empty": True}
    ours, _ = run(optim.adamw(0.1, weight_decay=decay, mask=mask), params, 30)
    leaves = torch_leaves(params)
    kept = [leaf for leaf, path in zip(leaves, trees.paths(params), strict=True) if "layers" not in path]
    others = [leaf for leaf, path in zip(leaves, trees.paths(params), strict=True) if "layers" in path]
    theirs = torch.optim.AdamW([{"params": kept}, {"params": others, "weight_decay": 0.0}], lr=0.1)
    for step in range(30):
        theirs.param_groups[0]["weight_decay"] = decay(step) if callable(decay) else decay
        step_torch(theirs, leaves, params, step)
    torch.testing.assert_close(trees.leaves(ours), leaves, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [optim.sgd, optim.adam, optim.adamw])
def test_every_decay_can_be_masked(optimizer: Callable) -> None:
    """Catches: an optimizer that drops its mask."""
    params = make_params()
    masked, _ = run(optimizer(0.1, weight_decay=0.3, mask={"layers": False, "scale": True, "empty": True}), params, 3)
    with_decay, _ = run(optimizer(0.1, weight_decay=0.3), params, 3)
    without, _ = run(optimizer(0.1, weight_decay=0.0), params, 3)
    assert torch.equal(masked["scale"], with_decay["scale"])
    assert torch.equal(masked["layers"][0].weight, without["layers"][0].weight)
    assert not torch.equal(with_decay["layers"][0].weight, without["layers"][0].weight)


def test_labels_may_be_a_function_or_a_prefix() -> None:
    """Catches: a prefix that holds for the first leaf below it only."""
    params = {"body": {"w": torch.ones(2), "b": torch.ones(2)}, "head": [torch.ones(1), torch.ones(1)]}
    groups = {"moving": optim.sgd(1.0), "still": optim.sgd(0.0)}
    whole = {"body": {"w": "still", "b": "still"}, "head": ["moving", "moving"]}
    for labels in (whole, {"body": "still", "head": "moving"}, lambda params: {"body": "still", "head": "moving"}):
        optimizer = optim.partition(groups, labels)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert [leaf.unique().item() for leaf in trees.leaves(updates)] == [0, 0, -1, -1]
    everything = optim.partition(groups, "moving")
    assert all((u == -1).all() for u in trees.leaves(everything.update(params, everything.init(params), params)[0]))


def test_a_group_is_measured_by_itself() -> None:
    """Catches: a norm over all leaves where it should be over the group's; None taken for a leaf."""
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([30.0, 40.0])}
    clip = optim.partition(
        {"x": optim.clip_by_global_norm(5.0), "y": optim.clip_by_global_norm(5.0)}, {"a": "x", "b": "y"}
    )
    updates, state = clip.update(grads, clip.init(params), params)
    assert torch.equal(updates["a"], grads["a"])
    torch.testing.assert_close(updates["b"], grads["a"])
    assert state == {"x": 1, "y": 1}


def test_groups_within_groups() -> None:
    """Catches: labels of the whole that do not fit what a group sees."""
    params = {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}
    inner = optim.partition({"p": optim.sgd(1.0), "q": optim.sgd(2.0)}, {"a": "p", "b": "q", "c": "q"})
    optimizer = optim.partition({"x": inner, "y": optim.sgd(0.0)}, {"a": "x", "b": "x", "c": "y"})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {name: update.item() for name, update in updates.items()} == {"a": -1, "b": -2, "c": 0}


def test_labels_and_masks_that_do_not_fit_are_named() -> None:
    """Catches: a leaf that no group moves, in silence; a mask of numbers; a message without the leaf."""
    params = {"w": torch.ones(2), "b": [torch.ones(1)]}
    groups = {"x": optim.sgd(1.0), "y": optim.sgd(1.0)}
    with pytest.raises(LeafError, match=r"params\['b'\]\[0\] has label 'z': expected one of 'x', 'y'"):
        optim.partition(groups, {"w": "x", "b": "z"}).init(params)
    with pytest.raises(LeafError, match=r"labels\['w'\]"):
        optim.partition(groups, {"w": {"v": "x"}, "b": "x"}).init(params)
    with pytest.raises(LeafError, match="prefix"):
        optim.partition(groups, {"w": "x"}).init(params)
    with pytest.raises(LeafError, match=r"params\['w'\] has mask 1: expected one of True, False"):
        optim.masked(optim.sgd(1.0), {"w": 1, "b": True}).init(params)
    with pytest.raises(LeafError, match="prefix"):
        optim.adamw(1.0, mask={"w": True}).init(params)
    for wrong in ({}, [optim.sgd(1.0)]):
        with pytest.raises(ArgumentError, match="transformations to be a dict"):
            optim.partition(wrong, "x")
    for build in (optim.chain, lambda t: optim.masked(t, True), lambda t: optim.partition({"x": t}, "x")):
        with pytest.raises(ArgumentError, match="pair of functions"):
            build(torch.optim.SGD([torch.zeros(1)], lr=1.0))


# Averages


def test_an_average_equals_torchs() -> None:
    """Catches: weights that change places; an average that is a step behind, or starts at zero."""
    params = make_params()
    module = torch.nn.ParameterList([torch.nn.Parameter(leaf) for leaf in torch_leaves(params)])
    theirs = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7))
    theirs.update_parameters(module)
    optimizer = optim.chain(optim.sgd(0.1), optim.average_iterates(0.7))
    state = optimizer.init(params)
    for step in range(10):
        updates, state = optimizer.update(make_grads(params, step), state, params)
        params = optim.apply_updates(params, updates)
        with torch.no_grad():
            for theirs_leaf, leaf in zip(module, trees.leaves(params), strict=True):
                theirs_leaf.copy_(leaf)
        theirs.update_parameters(module)
    average = trees.leaves(state[-1].average)
    torch.testing.assert_close(average, [leaf.detach() for leaf in theirs.module], rtol=1e-12, atol=0)
    assert state[-1].steps == 10


def test_an_average_changes_no_update() -> None:
    """Catches: a link that hands on the average in the updates' place."""
    plain, averaged = optim.sgd(0.1), optim.chain(optim.sgd(0.1), optim.average_iterates(0.9))
    assert_same(run(averaged, make_params(), 5)[0], run(plain, make_params(), 5)[0])


def test_an_average_of_half_precision_moves() -> None:
    """Catches: an average in bfloat16, to which a thousandth adds nothing; a schedule that is not asked."""
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    optimizer = optim.average_iterates(lambda step: 0.5 if step == 0 else 0.999)
    _, state = optimizer.update({"w": torch.ones(1, dtype=torch.bfloat16)}, optimizer.init(params), params)
    assert state.average["w"].item() == 0.5
    for _ in range(100):
        _, state = optimizer.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, params)
    assert state.average["w"].item() == pytest.approx(1 - 0.5 * 0.999**100, rel=1e-5)


def test_an_average_does_not_start_as_the_parameters_own_memory() -> None:
    """Catches: an average that changes with parameters that are changed in place."""
    params = {"w": torch.zeros(1)}
    state = optim.average_iterates(0.9).init(params)
    params["w"].add_(1)
    assert state.average["w"].item() == 0


# Clipping what a step has released


@every_dtype
@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_is_by_the_norm_over_all_leaves(max_norm: float, dtype: torch.dtype) -> None:
    """Catches: clipping leaf by leaf; a gradient made longer; one that is changed though it is short."""
    params = make_params(dtype)
    grads = make_grads(params, 0)
    clip = optim.clip_by_global_norm(max_norm)
    clipped, state = clip.update(grads, clip.init(params), params)
    norm = torch.cat([leaf.flatten() for leaf in trees.leaves(grads)]).double().norm()
    if norm < max_norm:
        assert_same(clipped, grads)
    for ours, grad in zip(trees.leaves(clipped), trees.leaves(grads), strict=True):
        torch.testing.assert_close(ours, (grad.double() * min(1, max_norm / norm)).to(dtype))
    assert state == 1
    if dtype == torch.float64:  # torch adds 1e-6 to the norm
        leaves = [torch.nn.Parameter(leaf) for leaf in trees.leaves(params)]
        for leaf, grad in zip(leaves, trees.leaves(grads), strict=True):
            leaf.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        torch.testing.assert_close(trees.leaves(clipped), [leaf.grad for leaf in leaves], rtol=1e-5, atol=0)


def test_clipping_follows_a_schedule() -> None:
    """Catches: the bound of the first step, or of the step before, for ever."""
    clip = optim.clip_by_global_norm(optim.linear_decay(3.0, steps=3, final=1.0))
    grads = {"w": torch.tensor([10.0])}
    state, found = clip.init(grads), []
    for _ in range(5):
        updates, state = clip.update(grads, state, grads)
        found.append(updates["w"].item())
    assert found == pytest.approx([3, 7 / 3, 5 / 3, 1, 1])


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


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            optim.linear_decay(0.3, steps=10, final=0.1),
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1 / 3, total_iters=10),
        ),
        (
            optim.exponential_decay(0.3, steps=4, factor=0.5),
            lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5**0.25),
        ),
        (
            optim.piecewise_constant(0.3, {7: 0.1, 3: 0.1}),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[3, 7], gamma=0.1),
        ),
    ],
    ids=["linear", "exponential", "piecewise"],
)
def test_schedules_are_torchs(ours: optim.Schedule, theirs: Callable) -> None:
    """Catches: a schedule that is a step early or late, or goes on after its end."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = theirs(optimizer)
    for step in range(15):
        assert ours(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


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
        (lambda v: optim.linear_decay(v, 3), "peak", [-1, NAN, INF]),
        (lambda v: optim.linear_decay(1, 3, v), "final", [-1, NAN, INF]),
        (lambda v: optim.linear_decay(1, v), "steps", [0]),
        (lambda v: optim.exponential_decay(v, 3, 0.5), "peak", [-1, NAN, INF]),
        (lambda v: optim.exponential_decay(1, 3, v), "factor", [0, 1.1, NAN]),
        (lambda v: optim.exponential_decay(1, v, 0.5), "steps", [0]),
        (lambda v: optim.piecewise_constant(v, {}), "first", [-1, NAN, INF]),
        (lambda v: optim.piecewise_constant(1, {3: v}), "factor", [-1, NAN, INF]),
        (optim.clip_by_global_norm, "max_norm", [0, -1, NAN, INF]),
        (optim.average_iterates, "decay", [-0.1, 1, NAN]),
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
    for build, name in (
        (optim.clip_by_global_norm, "max_norm"),
        (optim.average_iterates, "decay"),
        (optim.add_decayed_weights, "weight_decay"),
    ):
        optimizer = build(lambda step: -1.0)
        with pytest.raises(ArgumentError, match=rf"{name}=-1\.0"):
            optimizer.update(params, optimizer.init(params), params)


def test_a_chain_has_no_link_that_writes_over_the_gradients() -> None:
    """Catches: TorchOpt's default, by which an update is made in the memory of the gradients, inside a chain."""

    class InPlace:
        init = staticmethod(lambda params: ())

        @staticmethod
        def update(updates, state, *, params=None, inplace=True):
            return (updates.mul_(2) if inplace else 2 * updates), state

    grads = torch.ones(3)
    chained = optim.chain(InPlace())
    updates, _ = chained.update(grads, chained.init(grads), grads)
    assert torch.equal(grads, torch.ones(3))
    assert torch.equal(updates, torch.full((3,), 2.0))
