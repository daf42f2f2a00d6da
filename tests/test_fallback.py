"""What `auto` does where its strategy cannot: the loop runs the loss, and one warning says why. No other steps down.

And what is done so that it need not: operations without a batching rule run row by row, and a tensor that is the same
for all examples may begin to differ when it is written to.
"""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import pegrad

NAMED = ["ghost", "book_keeping"]
B = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def make():
    return {"v": r(3, 3), "w": r(3)}, r(B, 3)


def assert_exact(loss, strategy, make=make):
    params, batch = make()
    grads = oracle.per_example_grads(loss, params, batch)
    clip_norm = oracle.norms(grads).median().item()
    out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(grads, clip_norm))
    oracle.assert_close(out.norms, [oracle.norms(grads)])
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), grads)
    oracle.assert_close(pegrad.per_example_norm(loss, strategy=strategy)(params, batch), [oracle.norms(grads)])


class Doubled(torch.autograd.Function):
    """As functions were written before torch.func: without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def _old_function(p, x):
    return Doubled.apply(F.linear(x, p["v"]) * p["w"]).sin().sum()


def _write_into_a_view(p, x):
    y = torch.zeros(2, 3, dtype=x.dtype)
    y[0].copy_(x * p["w"])
    return y.sin().sum()


def _write_beside_a_view(p, x):
    y = torch.zeros(3, dtype=x.dtype)
    z = y.view(3)
    y[0] = (x * p["w"]).sum()
    return (y + 2 * z).sin().sum()


def _write_beside_a_detached(p, x):
    y = torch.zeros(3, dtype=x.dtype)
    z = y.detach()
    y[0] = x.sum()
    return (z * p["w"]).sin().sum()


def _write_after_use(p, x):
    w = p["w"] * 1
    y = (w.detach() * x).sum() + (w + x).sin().sum()
    w[0] = x.sum()
    return y + w.sum()


def _hook(p, x):
    y = p["w"] * x
    y.register_hook(lambda g: 2 * g.clamp(-0.5, 0.5))
    return y.sin().sum()


def _many_paths(p, x):
    return (p["w"] * x).sum() * (1 + x.sum().item())


STEPS_DOWN = [
    (_old_function, "torch.autograd.Function whose forward takes ctx"),
    (_write_into_a_view, "writes in place to a shared tensor"),
    (_write_beside_a_view, "writes in place to a shared tensor"),
    (_write_beside_a_detached, "writes in place to a shared tensor"),
    (_write_after_use, "writes in place to a tensor made of params"),
    (_hook, "calls register_hook"),
]


@pytest.mark.parametrize(("loss", "why"), STEPS_DOWN)
def test_auto_steps_down_and_says_why(loss, why):
    """Catches: a loss that the loop can run, and `auto` cannot; a reason that tells nothing; the price left out."""

    def fresh(p, x):
        return loss(p, x)

    with pytest.warns(pegrad.FallbackWarning, match=re.escape(why)) as warned:
        assert_exact(fresh, "auto")
    assert len(warned) == 1
    assert "fresh" in str(warned[0].message)
    assert "several times slower" in str(warned[0].message)


@pytest.mark.parametrize("strategy", NAMED)
@pytest.mark.parametrize(("loss", "why"), STEPS_DOWN)
def test_a_named_strategy_does_not(loss, why, strategy):
    """Catches: a strategy that is measured, and is the loop in truth; an error that names no strategy that can."""
    params, batch = make()
    for function in (
        pegrad.per_example_grad(loss, strategy=strategy),
        pegrad.per_example_norm(loss, strategy=strategy),
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy),
    ):
        with pytest.raises(pegrad.StrategyError, match=re.escape(why)) as caught:
            function(params, batch)
        assert "naive'" in str(caught.value)
    assert_exact(loss, "naive")


def test_more_paths_than_the_loop_is_worth():
    """Catches: a batch run once for every example; a named strategy that gives up where it is only slow."""

    def loss(p, x):
        return _many_paths(p, x)

    with pytest.warns(pegrad.FallbackWarning, match=r"take 6 paths or more .*item"):
        assert_exact(loss, "auto")
    for strategy in NAMED:
        assert_exact(loss, strategy)


def test_paths_that_multiply():
    """Catches: paths counted question by question, and not in all."""

    def loss(p, x):
        y = p["w"] * x
        for k in range(3):
            y = y.sin() if x[k] > 0 else y * 2
        return y.sum()

    def all_eight():
        signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
        return make()[0], signs

    with pytest.warns(pegrad.FallbackWarning, match="paths or more"):
        assert_exact(loss, "auto", all_eight)


def test_one_warning_for_each_loss():
    """Catches: a warning at each of a million steps; a second loss that is never spoken of."""
    params, batch = make()
    for loss in (lambda p, x: _hook(p, x), lambda p, x: _hook(p, x)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            function = pegrad.clipped_grad(loss, clip_norm=1.0, microbatch_size=2)
            for _ in range(3):
                function(params, batch)
        assert [w.category for w in warned] == [pegrad.FallbackWarning]


def test_a_warning_that_is_an_error_stays_itself():
    """Catches: `-W error` answered by a `StrategyError`; a warning that is never given again."""
    params, batch = make()

    def loss(p, x):
        return _hook(p, x)

    function = pegrad.per_example_grad(loss)
    for _ in range(2):
        with pytest.raises(pegrad.FallbackWarning):
            function(params, batch)


def test_random_numbers_are_as_in_the_loop():
    """Catches: numbers lost to the run that failed."""

    def loss(p, x):
        return _hook({"w": p["w"] * torch.rand(3, dtype=x.dtype)}, x)

    params, batch = make()
    torch.manual_seed(3)
    expected = pegrad.per_example_grad(loss, strategy="naive")(params, batch)
    torch.manual_seed(3)
    with pytest.warns(pegrad.FallbackWarning):
        found = pegrad.per_example_grad(loss)(params, batch)
    assert torch.equal(found["w"], expected["w"])


def test_what_the_loop_cannot_do_either_is_no_reason_to_warn():
    """Catches: a warning before the loss's own error, or in the place of it."""
    params, batch = make()

    class Mine(Exception):
        pass

    def raises(p, x):
        raise Mine

    def later(p, x):
        return F.embedding((x[0] > batch[2, 0]).long() * 7, p["v"]).sum()

    for loss, error in (
        (raises, Mine),
        (later, IndexError),
        (lambda p, x: p["u"], KeyError),
        (lambda p, x: F.batch_norm(x[None, :, None], None, None, p["w"], training=True).sum(), pegrad.LossError),
        (lambda p, x: x.sum(), pegrad.LossError),
        (lambda p, x: p["w"] * x, pegrad.LossError),
        (lambda p, x: ((p["w"] * x).sum(), "name"), pegrad.LeafError),
        (lambda p, x: (p["w"] * x.mul_(2)).sum(), pegrad.LossError),
    ):
        for function in (pegrad.per_example_grad(loss), pegrad.clipped_grad(loss, clip_norm=1.0)):
            with pytest.raises(error) as caught:
                function(params, batch)
            assert not isinstance(caught.value, pegrad.StrategyError)


def test_the_fallback_weighs_and_masks_as_all_do():
    """Catches: padding that the loop weighs; a sum in another dtype."""
    params, batch = {"w": torch.ones(3)}, torch.randn(300, 3)
    mask = torch.rand(300) < 0.5
    with pytest.warns(pegrad.FallbackWarning):
        out = pegrad.clipped_grad(lambda p, x: _hook(p, x), clip_norm=0.5)(params, batch, mask)
    grads = oracle.per_example_grads(_hook, params, batch[mask])
    assert out.grads["w"].dtype == torch.float64
    oracle.assert_close(out.grads, oracle.clipped_sum(grads, 0.5), 1e-6)
    assert (out.norms[~mask] == 0).all()


LSTM = nn.LSTM(3, 4).double()
ROWS = {
    "a mask": lambda p, x: (p["w"] * x)[x > 0].sin().sum() + F.linear(x, p["v"]).sum(),
    "masked_select": lambda p, x: torch.masked_select(p["w"] * x, x > 0).sin().sum() + F.linear(x, p["v"]).sum(),
    "nonzero": lambda p, x: (p["w"] * x)[(x > 0).nonzero().squeeze(1)].sin().sum() + F.linear(x, p["v"]).sum(),
    "unique": lambda p, x: (p["w"] * torch.unique((x > 0).double()).sum() * x).sin().sum(),
    "tensor_split": lambda p, x: torch.tensor_split(p["w"] * x, torch.tensor([1]))[1].sin().sum(),
    "several results": lambda p, x: (
        sum(t.double().sum() for t in torch.unique((x > 0).double() * p["w"].detach(), return_counts=True))
        * (p["w"] * x).sum()
    ),
    "a parameter": lambda p, x: p["w"][x > 0].sin().sum() + p["v"][:, x > 0].cos().sum() + F.linear(x, p["v"]).sum(),
    "data": lambda p, x: ((p["w"] * x).data * p["w"]).sin().sum(),
}


@pytest.mark.parametrize("strategy", [*NAMED, "auto"])
@pytest.mark.parametrize("name", ROWS)
def test_operations_without_a_batching_rule(name, strategy):
    """Catches: a gradient lost in the loop over rows, or a result of one example given to another."""

    def few_shapes():
        signs = torch.tensor([[1, 1, -1], [1, -1, -1]]).repeat(3, 1)
        return make()[0], r(B, 3).abs() * signs

    assert_exact(ROWS[name], strategy, few_shapes)


@pytest.mark.parametrize("strategy", NAMED)
def test_random_operations_row_by_row(strategy):
    """Catches: one example's numbers dealt to all."""
    params = {"w": torch.ones(50, dtype=torch.float64)}
    batch = -torch.ones(4, 50, dtype=torch.float64)
    grads = pegrad.per_example_grad(
        lambda p, x: torch.rrelu(p["w"] * x, 0.1, 0.9, training=True).sum(), strategy=strategy
    )
    slopes = -grads(params, batch)["w"]
    assert ((slopes > 0.1) & (slopes < 0.9)).all()
    assert len(slopes.unique()) == slopes.numel()


def _view_changed(p, x):
    y = p["w"] * x
    z = torch.tensor_split(y, torch.tensor([1]))[1]
    z.mul_(3)
    return (y * y).sum()


def _viewed_changed(p, x):
    y = p["w"] * x
    z = torch.tensor_split(y, torch.tensor([1]))[1]
    y.mul_(3)
    return (z * z).sum()


def _through_data(p, x):
    y = p["w"] * x
    y.data.mul_(3)
    return (y * y).sum()


@pytest.mark.parametrize("loss", [_view_changed, _viewed_changed, _through_data])
def test_views_taken_row_by_row_may_not_be_written_to(loss):
    """Catches: a write that the other side of the view would have seen."""
    params, batch = make()
    for strategy in NAMED:
        with pytest.raises(pegrad.StrategyError, match="no longer views of each other"):
            pegrad.per_example_grad(loss, strategy=strategy)(params, batch)
    with pytest.warns(pegrad.FallbackWarning):
        assert_exact(lambda p, x: loss(p, x), "auto")


def _fill(p, x):
    y, h = torch.zeros(4, 3, dtype=x.dtype), x
    for t in range(4):
        h = F.linear(h, p["v"]).tanh()
        y[t] = h
    return (y * p["w"]).sin().sum()


def _cache(p, x):
    cache = {"state": torch.zeros(3, dtype=x.dtype)}
    for _ in range(3):
        cache["state"].copy_(F.linear(x + cache["state"], p["v"]).tanh())
    return (cache["state"] * p["w"]).sum()


def _add_to(p, x):
    total = torch.zeros((), dtype=x.dtype)
    for t in range(3):
        total += (x[t] * p["w"]).sin().sum()
    return total


def _read_before(p, x):
    y = torch.ones(3, dtype=x.dtype)
    before = (y * x).sum()
    y[1:] = x[1:] * p["w"][1:]
    return before * y.sin().sum()


def _into_what_params_made(p, x):
    w = p["v"].clone()
    w[0] = x
    w[1] *= x
    return (F.linear(x, w) * p["w"]).sum()


def _by_a_mask(p, x):
    y, z, h = p["w"].clone(), torch.ones(3, 3, dtype=x.dtype), x * p["w"]
    y[x > 0] = 0.5
    z[x > 0] = h.sum()
    h[x.outer(x)[0] > 0] = p["v"][0, 0]
    return (y * x).sin().sum() + (z * h).cos().sum()


def _index_put(p, x):
    y = torch.zeros(3, dtype=x.dtype)
    y.index_add_(0, torch.tensor([0, 0, 2]), x * p["w"])
    return y.sin().sum()


@pytest.mark.parametrize("strategy", [*NAMED, "auto"])
@pytest.mark.parametrize("loss", [_fill, _cache, _add_to, _read_before, _into_what_params_made, _by_a_mask, _index_put])
def test_writes_into_what_is_shared_until_then(loss, strategy):
    """Catches: one example's numbers written for all, a gradient that does not come through the write."""
    assert_exact(loss, strategy)


def test_what_is_closed_over_is_left_alone():
    """Catches: a caller's tensor, or a module's buffer, that holds a batch when the call is over."""
    outside = torch.zeros(3, dtype=torch.float64)
    params, batch = make()

    def loss(p, x):
        y = outside.to(torch.float64)  # the same tensor
        y[0] = (x * p["w"]).sum()
        return y.sum()

    for strategy in NAMED:
        with pytest.raises(pegrad.StrategyError, match="writes in place to a shared tensor"):
            pegrad.per_example_grad(loss, strategy=strategy)(params, batch)
    assert torch.equal(outside, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("strategy", [*NAMED, "auto"])
def test_recurrent_modules(strategy):
    """Catches: 'Batching rule not implemented'."""

    def loss(p, x):
        return functional_call(LSTM, p, (x[None],))[0].sin().sum()

    assert_exact(loss, strategy, lambda: (dict(sorted(LSTM.named_parameters())), r(B, 3)))
