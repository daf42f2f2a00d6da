"""Losses whose path depends on the data: every example's gradient is that of the path it takes alone."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import oracle
import pegrad
from pegrad.call import Call
from pegrad.clipping import Flat, Grouping
from pegrad.problem import Problem
from pegrad.strategies.paths import by_path
from pegrad.tracing.questions import Split

TRACED = ["ghost", "book_keeping", "auto"]
B = 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def make():
    return {"v": r(3, 3), "w": r(3)}, r(B, 3)


def assert_exact(loss, strategy, mask=None, of=None, **options):
    """Compare losses, stacked gradients, norms, clipped sums and aux with the oracle's."""
    params, batch = make()
    rows = torch.arange(B) if mask is None else mask.nonzero().squeeze(1)
    grads = oracle.per_example_grads(of or loss, params, batch[rows])
    clip_norm = oracle.norms(grads).median().clamp(min=0.1).item()
    out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy, **options)(params, batch, mask)
    oracle.assert_close(out.grads, oracle.clipped_sum(grads, clip_norm))
    oracle.assert_close(out.norms[rows], [oracle.norms(grads)])
    stacked = pegrad.per_example_value_and_grad(loss, strategy=strategy)(params, batch, mask)
    oracle.assert_close([g[rows] for g in stacked.grads.values()], grads)
    norms = pegrad.per_example_norm(loss, strategy=strategy)(params, batch, mask)
    oracle.assert_close(norms[rows], [oracle.norms(grads)])
    results = [loss(params, x) for x in batch[rows]]
    pairs = zip(results, batch[rows], strict=True)
    results = [result if isinstance(result, tuple) else (result, x.new_zeros(())) for result, x in pairs]
    for got in (out, stacked):
        oracle.assert_close(got.losses[rows], [torch.stack([value for value, _ in results])])
        if got.aux is not None:
            oracle.assert_close(got.aux[rows], [torch.stack([aux for _, aux in results])])
    if mask is not None:
        for answer in (out.norms, out.losses, norms, *stacked.grads.values()):
            assert (answer[~mask] == 0).all()


def _if(p, x):
    y = (F.linear(x, p["v"]) * p["w"]).sum()
    return y.sin() if x.mean() > 0 else y.cos() * p["w"].sum()


def _if_by_a_parameter(p, x):
    y = F.linear(x, p["v"])
    return (y * p["w"]).sum() if (y @ p["w"]) > 0 else y.sin().sum()


def _nested(p, x):
    y = F.linear(x, p["v"])
    if x[0] > 0:
        y = y.sin() if x[1] > 0 else y * p["w"]
    elif x[2] > 0:
        y = y.tanh()
    return y.sum(), y.sum()


def _while(p, x):
    steps, y = 0, x
    while y.norm() > 1:
        y, steps = F.linear(y, p["v"]).sin() / 2, steps + 1
    return (y * p["w"]).sum() * (1 + steps), x.new_tensor(float(steps))


def _all(p, x):
    mask = x > -1
    y = F.linear(x, p["v"])
    return y.sum() if mask.all() else (y.sin() * mask).sum()


def _int(p, x):
    return (x * p["w"]).sin().sum() * (int(x[0] * 2) + 3)


def _float(p, x):
    return (x * p["w"]).sin().sum() * float(x[0].round())


def _index(p, x):
    return p["w"][: (x > 0).sum().long()].sin().sum() + F.linear(x, p["v"]).sum()


def _range(p, x):
    return sum(((x * p["w"]).sum() * k).sin() for k in range(1 + (x > 0).sum()))


def _item(p, x):
    return (x * p["w"]).sum() * x[0].sign().item()


def _tolist(p, x):
    return (x * p["w"]).sum() * (2 if (x[:1] > 0).tolist()[0] else 3)


def _numpy(p, x):
    return (x * p["w"]).sum() * float(x[:1].sign().numpy()[0])


def _equal(p, x):
    return (x * p["w"]).sum() * (2 if torch.equal(x.sign(), x.abs().sign()) else 3)


def _contains(p, x):
    return (x * p["w"]).sum() * (2 if 1.0 in x.sign() else 3)


def _assert(p, x):
    assert x.isfinite().all()
    assert not (x > 100).any()
    return (x * p["w"]).sin().sum()


LOSSES = [
    _if, _if_by_a_parameter, _nested, _while, _all, _int, _float, _index, _range, _item, _tolist, _numpy, _equal,
    _contains, _assert,
]  # fmt: skip


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_question(loss, strategy):
    """Catches: one example's answer taken for another's, rows put back in the wrong order, a path left out."""
    assert_exact(loss, strategy)


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("loss", [_if, _nested, _while])
@pytest.mark.parametrize("size", [None, 1, 4])
def test_padding_and_microbatches(loss, strategy, size):
    """Catches: padding that has a path of its own, or that is weighed."""
    mask = torch.tensor([True, False, True, True, False, True, True, False, True])
    assert_exact(loss, strategy, mask, microbatch_size=size)
    params, batch = make()
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch, torch.zeros(B, dtype=torch.bool))
    assert all((grad == 0).all() for grad in out.grads.values())
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch[:0])
    assert all((grad == 0).all() for grad in out.grads.values())


@pytest.mark.parametrize("strategy", TRACED)
def test_padding_is_not_asked(strategy):
    """Catches: padding for which a path is run that no example takes, and which fails on it."""

    def loss(p, x):
        if (x == 0).all():
            raise ValueError("padding")
        return (x * p["w"]).sin().sum()

    params, batch = make()
    batch[4:] = 0
    mask = torch.arange(B) < 4
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch, mask)
    oracle.assert_close(out.grads, oracle.clipped_sum(oracle.per_example_grads(loss, params, batch[:4]), 1.0))


@pytest.mark.parametrize("answers", [[0.0, -0.0], [float("nan"), float("nan")], [1, 1.0]])
def test_answers_that_python_tells_apart(answers):
    """Catches: 0.0 taken for -0.0, and NaN for another answer than NaN."""
    runs = []

    def loss(p, example):
        x, one = example
        sign = math.copysign(1.0, x.item())
        runs.append(1)
        return p * one * sign

    batch = torch.tensor(answers, dtype=torch.float64)
    grads = pegrad.per_example_grad(loss)(torch.ones((), dtype=torch.float64), (batch, torch.ones(2).double()))
    assert torch.equal(grads, torch.copysign(torch.ones(()), batch))
    assert len(runs) == (2 if answers[0] == 0 else 1)


@pytest.mark.parametrize("strategy", TRACED)
def test_each_path_runs_once(strategy):
    """Catches: a loop over the examples in disguise."""
    sizes = []

    def loss(p, x):
        value = _if(p, x)
        sizes.append(1)  # for each run that comes to its end
        return value

    params, batch = make()
    pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    assert len(sizes) == 2


def _suppressed(p, x):
    y = (p["w"] * x).sum()
    try:
        if x.sum() > 0:
            return y * 2
    except Exception:
        pass
    return y.sin()


def _suppressed_altogether(p, x):
    y = (p["w"] * x).sum()
    try:
        if x.sum() > 0:
            return y * 2
    except:  # noqa: E722
        pass
    return y.sin()


def _suppressed_and_raised(p, x):
    y = (p["w"] * x).sum()
    try:
        return y * 2 if x.sum() > 0 else y.sin()
    except:  # noqa: E722
        raise RuntimeError("no answer") from None


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("loss", [_suppressed, _suppressed_altogether, _suppressed_and_raised])
def test_the_signal_cannot_be_caught(loss, strategy):
    """Catches: all examples on the path that the loss takes when a question fails."""
    assert_exact(loss, strategy)


@pytest.mark.parametrize("strategy", TRACED)
def test_a_path_on_which_the_loss_is_constant(strategy):
    """Catches: such a path refused, though others depend on the parameters; and a batch of nothing else let through."""

    def loss(p, x):
        return (x * p["w"]).sin().sum() if x[0] > 0 else x.sum()

    assert_exact(loss, strategy, of=lambda p, x: loss(p, x) + 0 * p["w"].sum())
    params, batch = make()
    with pytest.raises(pegrad.LossError, match="does not depend on any leaf"):
        pegrad.per_example_grad(lambda p, x: x.sum() if x[0] > 0 else x.prod(), strategy=strategy)(params, batch)


@pytest.mark.parametrize("strategy", [*TRACED, "naive"])
def test_paths_that_return_other_aux(strategy):
    """Catches: the aux of one path returned under the names of another's."""
    params, batch = make()

    def names(p, x):
        y = (x * p["w"]).sum()
        return y, {"a": y} if x[0] > 0 else {"b": y}

    with pytest.raises(pegrad.LossError, match="aux of one structure"):
        pegrad.per_example_value_and_grad(names, strategy=strategy)(params, batch)
    if strategy != "naive":
        with pytest.raises(pegrad.LossError, match="aux of one shape"):
            pegrad.per_example_value_and_grad(
                lambda p, x: ((x * p["w"]).sum(), x if x[0] > 0 else x[:2]), strategy=strategy
            )(params, batch)


@pytest.mark.parametrize("strategy", TRACED)
def test_the_dtype_of_a_sum_is_that_of_all_rows(strategy):
    """Catches: the sums of paths in float32, where that of the batch is to be kept in float64."""
    params, batch = {"w": torch.ones(3)}, torch.randn(300, 3)
    out = pegrad.clipped_grad(
        lambda p, x: (x * p["w"]).sum() * (1 if x[0] > 0 else 2), clip_norm=1.0, strategy=strategy
    )
    assert out(params, batch).grads["w"].dtype == torch.float64
    assert out(params, batch[:200]).grads["w"].dtype == torch.float32
    problem = Call.of(lambda p, x: (x * p["w"]).sum() * (1 if x[0] > 0 else 2), params, batch, None).problem
    grouping = Grouping.flat(1, Flat(1.0))
    for path in by_path(problem, lambda part: pegrad.STRATEGIES[strategy].clipped_sum(part, grouping)):
        assert path.answer[0][0].dtype == torch.float64


@pytest.mark.parametrize("strategy", TRACED)
def test_an_example_changed_in_place_is_refused(strategy):
    """Catches: a change that only a copy of the rows sees."""

    def loss(p, x):
        y = (p["w"] * x.detach().clone()).sum()
        if x[0] > 0:
            x.mul_(2)
        return y

    params, batch = make()
    with pytest.raises(pegrad.LossError, match="in place"):
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)


@pytest.mark.parametrize("strategy", TRACED)
class TestRandomness:
    """Catches: rows picked out of a batch and dealt other rows' random numbers."""

    def test_a_branch_keeps_its_probability(self, strategy):
        """A tenth of the examples, asked again with other numbers, would be sent on until they come out below 0.9."""

        def loss(p, x):
            u = torch.rand((), dtype=x.dtype)
            return (p["w"] * x).sum() * (1.0 if u < 0.9 else 2.0), u

        params, batch = {"w": torch.ones(3, dtype=torch.float64)}, torch.ones(50, 3, dtype=torch.float64)
        function = pegrad.per_example_value_and_grad(loss, strategy=strategy)
        low = 0
        for _ in range(40):
            out = function(params, batch)
            below = out.aux < 0.9
            assert torch.equal(out.grads["w"][:, 0] == 1.0, below)
            low += int(below.sum())
        assert abs(low / 2000 - 0.9) < 4 * math.sqrt(0.09 / 2000)

    def test_what_was_drawn_before_stays(self, strategy):
        def loss(p, x):
            drop = F.dropout(torch.ones_like(x), 0.5)
            late = drop.sum() * 0
            if x[0] > 0:
                late = torch.rand((), dtype=x.dtype)
            return (p["w"] * x * drop).sum() * (1 + late), (drop, late + 0 * x.sum())

        params, batch = make()
        torch.manual_seed(1)
        out = pegrad.per_example_value_and_grad(loss, strategy=strategy)(params, batch)
        drop, late = out.aux
        oracle.assert_close(out.grads["w"], [batch * drop * (1 + late[:, None])])
        assert len(drop.unique(dim=0)) > 2
        assert len(late.unique()) == 1 + int((batch[:, 0] > 0).sum())
        torch.manual_seed(1)
        again = pegrad.clipped_grad(loss, clip_norm=1e9, strategy=strategy)(params, batch)
        assert torch.equal(again.aux[0], drop)
        oracle.assert_close(again.grads["w"], [out.grads["w"].sum(0)])

    def test_no_example_is_run_on_another_path(self, strategy):
        """Catches: rows that only lend their random numbers, run with their own data, which that path cannot take."""
        tokens = torch.tensor([0, 5, 1, 4, 2, 3])

        def loss(p, token):
            keep = torch.rand((), dtype=torch.float64)
            table, token = (p["small"], token) if token < 3 else (p["large"], token - 3)
            return F.embedding(token, table).sum() * keep, keep

        params = {"large": r(3, 2), "small": r(3, 2)}
        out = pegrad.per_example_value_and_grad(loss, strategy=strategy)(params, tokens)
        for row, (token, keep) in enumerate(zip(tokens.tolist(), out.aux, strict=True)):
            name, other = ("small", "large") if token < 3 else ("large", "small")
            assert (out.grads[name][row, token % 3] == keep).all()
            assert (out.grads[other][row] == 0).all()

    def test_a_constant_path_that_chance_chooses(self, strategy):
        def loss(p, x):
            u = torch.rand((), dtype=x.dtype)
            return ((p["w"] * x).sum() if u < 0.5 else x.sum()), u

        params, batch = make()
        out = pegrad.clipped_grad(loss, clip_norm=1e9, strategy=strategy)(params, batch)
        assert torch.equal(out.norms > 0, out.aux < 0.5)


def few_paths():
    params, batch = make()
    return params, batch.abs() * torch.tensor([1, -1, 1, 1, -1, 1, -1, 1, 1])[:, None]


def _hooked(p, x):
    y = p["w"] * x
    y.register_hook(lambda g: 2 * g)
    return y.sin().sum() + F.linear(x, p["v"]).cos().sum()


@pytest.mark.parametrize("loss", [_if, _hooked])
def test_statistics(loss):
    """Catches: a statistic of one path's examples, or none at all; rows of different paths that never meet."""
    params, batch = few_paths()
    grads = oracle.per_example_grads(loss, params, batch)
    flat = torch.cat([g.flatten(1) for g in grads], 1)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pegrad.FallbackWarning)
        dots = pegrad.per_example_dot(loss)(params, batch, direction)
        gram = pegrad.gradient_gram(loss)(params, batch)
        moments = pegrad.gradient_moments(loss)(params, batch)
        scale = pegrad.gradient_noise_scale(loss)(params, batch).scale
    oracle.assert_close(dots, [flat @ torch.cat([d.flatten() for d in direction.values()])])
    oracle.assert_close(gram, [flat @ flat.T])
    oracle.assert_close(moments.mean, [g.mean(0) for g in grads])
    oracle.assert_close(moments.variance, [g.var(0) for g in grads])
    signal = flat.mean(0).square().sum() - flat.var(0).sum() / B
    expected = flat.var(0).sum() / signal if signal > 0 else torch.tensor(torch.inf).double()
    assert torch.equal(scale, expected) or (scale - expected).abs() <= 1e-9 * expected.abs()


@pytest.mark.parametrize("strategy", TRACED)
def test_explain_shows_every_path(strategy):
    """Catches: a table of one path's uses, or a leaf called unused that another path uses."""
    params, batch = few_paths()

    def loss(p, x):
        return F.linear(x, p["v"]).sin().sum() if x.sum() > 0 else (x * p["w"]).sin().sum()

    explanation = pegrad.explain(loss, params, batch, strategy=strategy)
    assert explanation.paths == (6, 3)
    assert "2 paths, taken by 6 and 3 examples" in str(explanation)
    assert {use.operation for use in explanation.uses} == {"linear", "mul"}
    assert explanation.unused == ()
    assert isinstance(pegrad.autotune(loss, params, batch, strategy=strategy), pegrad.Strategy)


def test_explain_shows_the_fallback():
    """Catches: a table of what does not run."""
    params, batch = make()
    explanation = pegrad.explain(_hooked, params, batch)
    assert "naive" in str(explanation)
    assert "register_hook" in explanation.fallback
    assert "register_hook" in explanation._repr_html_()
    with pytest.raises(pegrad.StrategyError, match="register_hook"):
        pegrad.explain(_hooked, params, batch, strategy="ghost")
    with pytest.raises(KeyError):
        pegrad.explain(lambda p, x: p["u"], params, batch)


def test_under_a_transform_the_question_fails_as_before():
    """Catches: the rows of an outer transform taken for the examples."""
    params, batch = make()

    def total(p):
        return pegrad.per_example_grad(_if, strategy="auto")(p, batch)["w"].sum()

    with pytest.raises(pegrad.StrategyError, match="asks a tensor for its value"):
        torch.func.grad(total)(params)


def test_the_signal_is_no_exception():
    """Catches: `except Exception` in a loss, or in a library that it calls."""
    assert not issubclass(Split, Exception)


def test_parts_are_of_the_rows_that_take_them():
    """Catches: indices of a part taken for indices of the batch, where parts fall apart again."""
    batch = torch.arange(8)

    def run(problem):
        kinds = problem.batch[0]
        if len(kinds) == 8:
            raise Split([[0, 2, 4, 6], [1, 3, 5, 7]], "parity")
        if len(kinds) == 4 and kinds[0] == 1:
            raise Split([[0, 3], [1, 2]], "more")
        return kinds

    paths = by_path(Problem(lambda p, x: (x, []), [torch.ones(1)], [batch]), run)
    assert [path.answer[path.rows].tolist() for path in paths] == [[0, 2, 4, 6], [1, 7], [3, 5]]
    assert [path.origin.tolist() for path in paths] == [[0, 2, 4, 6], [1, 7], [3, 5]]
