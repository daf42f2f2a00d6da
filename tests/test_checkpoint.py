"""`pegrad.checkpoint`: forgets what a function computed, and finds the same gradients."""

import functools
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

import oracle
import pegrad
from cases import r
from pegrad.tracing.batched import physical

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

B, D = 3, 6
TRACED = ["ghost", "book_keeping", "auto"]
CASES: dict[str, tuple[Any, Any, Any]] = {}


def case(params: Any, batch: Any = lambda: r(B, 4, D)) -> Any:
    def register(loss: Any) -> Any:
        CASES[loss.__name__] = loss, params, batch
        return loss

    return register


@case(lambda: {"w": r(D, D), "b": r(D)})
def one_function(p, x):
    return pegrad.checkpoint(lambda h: F.linear(h, p["w"], p["b"]).tanh().exp(), x).sin().sum()


@case(lambda: {"u": r(D, D), "v": r(D, D)})
def closures_that_need_a_gradient(p, x):
    """Catches: a gradient by way of what the function closes over, lost."""
    h = (x @ p["u"]).sin()
    return pegrad.checkpoint(lambda t: (h * (t @ p["v"]).cos()).exp(), h).sum()


@case(lambda: {"w": r(D, D), "s": r(D)})
def copies(p, x):
    """Catches: copies made anew when the function runs again, first made inside it or before it."""
    x = x * p["s"]
    h = pegrad.checkpoint(lambda t: (t * p["s"]).sin() * p["w"][0], x)
    return pegrad.checkpoint(lambda t: (t * p["w"][0]).cos() * p["s"], h).exp().sum()


@case(lambda: {"w": r(D, D), "g": r(D, 1)})
def weights_made_inside(p, x):
    """Catches: a weight made again that is taken for another parameter."""

    def block(h):
        weight = p["g"] * F.normalize(p["w"], dim=1)
        return F.linear(h, weight).sin() * weight.square().sum(1)

    return pegrad.checkpoint(block, x).cos().sum()


@case(lambda: {"w": r(D, D)})
def one_function_many_times(p, x):
    """Catches: one call's activations taken for another's."""
    for step in range(4):
        x = pegrad.checkpoint(lambda h, step=step: (h @ p["w"]).tanh() * (1 + step), x)
    return x.sum()


@case(lambda: {"u": r(D, D), "v": r(D, D)})
def nested(p, x):
    """Catches: what runs again inside what runs again."""

    def inner(h):
        return (h @ p["u"]).sin() * h

    def outer(h):
        h = pegrad.checkpoint(inner, (h @ p["v"]).cos())
        return pegrad.checkpoint(lambda t: pegrad.checkpoint(inner, t.exp()).tanh(), h) @ p["v"]

    return pegrad.checkpoint(outer, x).sin().sum()


@case(lambda: {"table": r(7, D), "k": r(3, D, 3)}, lambda: (torch.randint(7, (B, 5)), r(B, 5, D)))
def several_arguments_and_results(p, example):
    """Catches: arguments by name, results that are no tensor."""

    def block(tokens, *, shift):
        h = F.embedding(tokens, p["table"]) + shift
        return {"h": h.sin(), "y": F.conv1d(h.T, p["k"])}, 2.0

    out, scale = pegrad.checkpoint(block, example[0], shift=example[1])
    return scale * out["y"].exp().sum() + out["h"].cos().sum()


@case(lambda: {"w": r(D, D)})
def changed_in_place_inside(p, x):
    def block(h):
        h = h @ p["w"]
        h += 1
        return h.relu_().sin() * 2

    return pegrad.checkpoint(block, x).exp().sum()


@case(lambda: {"w": r(D, D), "unused": r(D)})
def without_a_gradient(p, x):
    with torch.no_grad():
        scale = pegrad.checkpoint(lambda h: (h @ p["w"]).square(), x)
    return (scale * (x @ p["w"])).sum()


class Block(nn.Module):
    """A block as Hugging Face writes it: called through a partial of its own `__call__`."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        call = functools.partial(super().__call__, **options)
        return pegrad.checkpoint(call, x) if self.checkpointed else call(x)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + scale * self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in range(3))
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x).logsumexp(-1).sum()


MODEL = Model(True).double()


@case(lambda: {name: r(*p.shape) for name, p in MODEL.named_parameters()})
def modules(p, x):
    """Catches: a module that has its own weights back by the time of the backward pass."""
    return functional_call(MODEL, p, (x[None],))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_function_itself(name, strategy, monkeypatch):
    loss, params, batch = CASES[name]
    params, batch = params(), batch()
    with monkeypatch.context() as patched:
        patched.setattr(pegrad, "checkpoint", lambda function, *args, **kwargs: function(*args, **kwargs))
        expected = oracle.per_example_grads(loss, params, batch)
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)
    norms = pegrad.per_example_norm(loss, strategy=strategy)(params, batch)
    oracle.assert_close(norms, [oracle.norms(expected)])
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))


@pytest.mark.parametrize("name", CASES)
def test_plain_autograd_runs_it_too(name, monkeypatch):
    loss, params, batch = CASES[name]
    params, batch = params(), batch()
    found = oracle.per_example_grads(loss, params, batch)
    monkeypatch.setattr(pegrad, "checkpoint", lambda function, *args, **kwargs: function(*args, **kwargs))
    oracle.assert_close(found, oracle.per_example_grads(loss, params, batch))


def test_sites_stay_sites():
    """Catches: what is forgotten taken for an operation without a rule."""
    loss, params, batch = CASES["modules"]
    uses = pegrad.explain(loss, params(), batch()).uses
    assert not [use for use in uses if use.norm == "copies"]
    assert len([use for use in uses if use.operation == "linear"]) == 3 * (2 + 2) + 1


@pytest.mark.parametrize("strategy", TRACED)
def test_dropout_draws_the_same_numbers_again(strategy):
    """Catches: another mask in the backward pass; random numbers after it that its running again has moved."""

    def loss(p, x, call):
        h = call(lambda h: F.dropout(h @ p["w"], 0.5).sin().exp(), x)
        return (F.dropout(h, 0.5) @ p["w"]).sum()

    params, x = {"w": r(D, D)}, r(B, 4, D)
    grads, states = [], []
    for call in (pegrad.checkpoint, lambda function, *args: function(*args)):
        torch.manual_seed(1)
        grads.append(pegrad.per_example_grad(functools.partial(loss, call=call), strategy=strategy)(params, x)["w"])
        states.append(torch.get_rng_state())
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("strategy", TRACED)
def test_autocast_is_the_same_again(strategy):
    """Catches: the second run in another dtype than the first."""

    def loss(p, x, call):
        with torch.autocast("cpu", torch.bfloat16):
            return call(lambda h: (h @ p["w"]).float().sin(), x).sum()

    params, x = {"w": torch.randn(D, D)}, torch.randn(B, 4, D)
    found, expected = (
        pegrad.per_example_grad(functools.partial(loss, call=call), strategy=strategy)(params, x)["w"]
        for call in (pegrad.checkpoint, lambda function, *args: function(*args))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("forgets", "strategy"), [(True, s) for s in TRACED] + [(False, s) for s in TRACED])
def test_activations_are_forgotten(forgets, strategy):
    """Catches: activations held all the same, by the graph or by what runs again."""
    runs, alive = [], []

    def block(h, weight):
        made = weight.exp()
        saved = [h.sin(), h.exp(), h @ made, made]  # by what comes next; by their own graph; by a tap; for the tap
        runs.append([StorageWeakRef(physical(t).untyped_storage()) for t in saved])
        return saved[0].sin() + saved[1] + saved[2].cos()

    def loss(p, x):
        runs.clear()
        h = x @ p["w"]
        h = pegrad.checkpoint(block, h, p["v"]) if forgets else block(h, p["v"])
        alive.append([not reference.expired() for reference in runs[0]])
        return h.sum()

    gc.disable()
    try:
        pegrad.per_example_norm(loss, strategy=strategy)({"w": r(D, D), "v": r(D, D)}, r(B, 4, D))
        assert alive == [[not forgets] * 3 + [True]]
        assert len(runs) == 1 + forgets
        assert all(reference.expired() for run in runs for reference in run)
    finally:
        gc.enable()


def test_nothing_outlives_a_loss_that_fails():
    """Catches: a circle of references that holds all activations until the next garbage collection."""
    kept = []

    def loss(p, x):
        h = x @ p["w"]
        kept.append(StorageWeakRef(physical(h).untyped_storage()))
        return pegrad.checkpoint(lambda t: t.sin() @ p["w"], h).sum((0, 1)) * p["w"].sum()

    params, x = {"w": r(D, D)}, r(B, 4, D)
    pegrad.per_example_norm(loss)(params, x)
    gc.collect()
    gc.disable()
    try:
        pegrad.explain(loss, params, x)
        pegrad.per_example_norm(loss)(params, x)
        assert all(reference.expired() for reference in kept)
    finally:
        gc.enable()


HIDDEN = nn.Linear(D, D).double()


class Keeper:
    """Holds a module where nobody looks for it."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
@pytest.mark.parametrize("after", [False, True])
def test_a_module_that_is_not_found_is_refused(strategy, after):
    """Catches: the module's own weights differentiated in place of those that it was given."""
    keeper = Keeper(HIDDEN)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = HIDDEN

        def forward(self, x):
            def block(h):
                return keeper.module(h).sin() if not after else h.sin() * keeper.module.weight.sin().sum()

            return pegrad.checkpoint(block, x).exp().sum() + self.inner.weight.sum()

    outer = Outer()
    params = {name: r(*p.shape) for name, p in outer.named_parameters()}
    with pytest.raises(pegrad.LossError, match="other parameters"):
        pegrad.per_example_norm(lambda p, x: functional_call(outer, p, (x,)), strategy=strategy)(params, r(B, D))


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
@pytest.mark.parametrize("more", [-1, 1])
def test_what_does_otherwise_the_second_time_is_refused(strategy, more):
    """Catches: the activations of one path used for the gradients of another."""

    def loss(p, x):
        times = [2, 2 + more]

        def block(h):
            for _ in range(times.pop(0)):
                h = h.sin()
            return h

        return pegrad.checkpoint(block, x @ p).sum()

    with pytest.raises(pegrad.LossError, match="pure function"):
        pegrad.per_example_norm(loss, strategy=strategy)(r(D, D), r(B, D))


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_an_argument_changed_in_place_is_refused(strategy):
    """Catches: the second run on other numbers than the first."""

    def loss(p, x):
        h = (x @ p) * 2
        y = pegrad.checkpoint(lambda h: h.sin().exp(), h)
        h.add_(1)
        return (y + h).sum()

    with pytest.raises(pegrad.LossError, match="in place"):
        pegrad.per_example_norm(loss, strategy=strategy)(r(D, D), r(B, D))


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
@pytest.mark.parametrize("inputs", ["examples", "parameters"])
def test_torchs_own_is_refused_by_name(strategy, inputs):
    """Catches: `functional_call` with `torch.utils.checkpoint`, which differentiates the module's own weights."""
    if torch.__version__ < "2.12" and strategy in {"vmap", "grouped_conv"}:
        pytest.skip("PyTorch 2.11 leaves a checkpoint's hooks in force where `vmap` fails, and then fails itself")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = HIDDEN

        def forward(self, x):
            if inputs == "examples":
                return torchs_checkpoint(lambda t: self.inner(t).sin(), x, use_reentrant=False).sum()
            weight = torchs_checkpoint(lambda: self.inner.weight.sin().exp(), use_reentrant=False)
            return (F.linear(x, weight) + self.inner.bias).sum()

    outer = Outer()
    params = {name: r(*p.shape) for name, p in outer.named_parameters()}
    with pytest.raises(pegrad.StrategyError, match=r"pegrad\.checkpoint"):
        pegrad.per_example_norm(lambda p, x: functional_call(outer, p, (x,)), strategy=strategy)(params, r(B, D))
    gc.collect()  # PyTorch 2.11 takes its hooks away when the error is gone
