"""Programs that could get wrong numbers in silence: each is exact, or is refused with a typed error."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import pegrad

# PyTorch says the first of some batching rules, and the second of itself when it decomposes for forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]

STRATEGIES = [*pegrad.STRATEGIES]
TRACED = ["ghost", "book_keeping", "auto"]
TRANSFORMED = ["vmap", "grouped_conv"]
B = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def two_vectors():
    return {"v": r(3), "w": r(3)}, r(B, 3)


def matrix_and_vector():
    return {"v": r(3), "w": r(2, 3)}, r(B, 3)


def assert_exact(loss, make, strategy, of=None):
    """Compare stacked gradients, norms and clipped sums, some or none of them clipped, with the oracle's."""
    params, batch = make()
    grads = oracle.per_example_grads(of or loss, params, batch)
    assert oracle.norms(grads).min() > 0
    for clip_norm in (oracle.norms(grads).median().item(), 1e9):
        out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy)(params, batch)
        oracle.assert_close(out.grads, oracle.clipped_sum(grads, clip_norm))
        oracle.assert_close(out.norms, [oracle.norms(grads)])
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), grads)
    oracle.assert_close(pegrad.per_example_norm(loss, strategy=strategy)(params, batch), [oracle.norms(grads)])


def assert_refused(loss, make, strategy, message, error=pegrad.LossError):
    params, batch = make()
    for function in (
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy),
        pegrad.per_example_grad(loss, strategy=strategy),
        pegrad.per_example_norm(loss, strategy=strategy),
    ):
        with pytest.raises(error, match=message):
            function(params, batch)


def assert_steps_down(loss, make, strategy, message):
    """A named strategy refuses; `auto` has the loop run it, and says why."""
    if strategy != "auto":
        assert_refused(loss, make, strategy, message, pegrad.StrategyError)
        return
    with pytest.warns(pegrad.FallbackWarning, match=message):
        assert_exact(lambda p, x: loss(p, x), make, strategy)  # another loss each time, for each is warned of once


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestCompiled:
    """Catches: gradients of zero, since dynamo replays operations but not what the trace notes while they run."""

    @pytest.fixture(autouse=True)
    def _reset(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing dynamo
            import torch._dynamo
        torch._dynamo.reset()

    @pytest.fixture(params=["eager", "aot_eager"])
    def backend(self, request):
        return request.param

    def test_around_the_call(self, strategy, backend):
        def loss(params, x):
            return F.linear(x * params["v"], params["w"]).sin().sum()

        params, batch = matrix_and_vector()
        function = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)
        compiled = torch.compile(lambda p, x: trees_times(2, function(p, x * 1.0).grads), backend=backend)
        expected = oracle.clipped_sum(oracle.per_example_grads(loss, params, batch), 0.5)
        for _ in range(2):
            oracle.assert_close(compiled(params, batch), [2 * g for g in expected])
        itself = torch.compile(function, backend=backend)
        oracle.assert_close(itself(params, batch).grads, expected)

    def test_around_a_whole_step(self, strategy):
        step = pegrad.dp_sgd(
            lambda p, x: F.linear(x * p["v"], p["w"]).sin().sum(),
            pegrad.optim.sgd(0.1),
            clip_norm=0.5,
            noise_multiplier=0.0,
            expected_batch_size=B,
            strategy=strategy,
        )
        params, batch = matrix_and_vector()
        state = step.init(params, pegrad.random.key(0))
        expected = step(params, state, batch).params
        found = torch.compile(lambda p, b: step(p, state, b).params, backend="eager")(params, batch)
        oracle.assert_close(found, [expected["v"], expected["w"]])
        assert not torch.equal(found["w"], params["w"])

    def test_loss(self, strategy, backend):
        def loss(params, x):
            return F.linear(x * params["v"], params["w"]).sin().sum()

        assert_exact(torch.compile(loss, backend=backend, fullgraph=True), matrix_and_vector, strategy, of=loss)

    def test_loss_that_has_run_compiled_before(self, strategy, backend):
        def loss(params, x):
            return F.linear(x * params["v"], params["w"]).sin().sum()

        compiled = torch.compile(loss, backend=backend)
        params, batch = matrix_and_vector()
        compiled(params, batch[0])
        assert_exact(compiled, matrix_and_vector, strategy, of=loss)
        compiled(params, batch[0])

    def test_module(self, strategy, backend):
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        compiled = torch.compile(module, backend=backend)

        def make():
            return dict(compiled.named_parameters()), r(B, 3)

        def loss(params, x):
            return functional_call(compiled, params, (x[None],)).square().sum()

        def plain(params, x):
            params = {name.removeprefix("_orig_mod."): p for name, p in params.items()}
            return functional_call(module, params, (x[None],)).square().sum()

        assert_exact(loss, make, strategy, of=plain)

    def test_statistics(self, strategy):
        compiled = torch.compile(lambda p, x: F.linear(x * p["v"], p["w"]).sin().sum(), backend="eager")
        params, batch = matrix_and_vector()
        grads = pegrad.per_example_grad(compiled, strategy=strategy)(params, batch)
        flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
        oracle.assert_close(pegrad.gradient_gram(compiled)(params, batch), [flat @ flat.T])
        dots = torch.compile(pegrad.per_example_dot(compiled), backend="eager")(params, batch, params)
        oracle.assert_close(dots, [flat @ torch.cat([p.flatten() for p in params.values()])])


def trees_times(factor, tree):
    return {name: factor * leaf for name, leaf in tree.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestModes:
    """Catches: gradients of zero where autograd is switched off around the call, or in part of the loss."""

    def test_inference_mode_around_the_call(self, strategy):
        def loss(params, x):
            return F.linear(x * params["v"], params["w"]).sin().sum()

        with torch.inference_mode():
            assert_exact_in_inference_mode(loss, strategy)

    def test_tensors_made_in_inference_mode(self, strategy):
        def loss(params, x):
            return F.linear(x * params["v"], params["w"]).sin().sum()

        with torch.inference_mode():
            params, batch = matrix_and_vector()
        out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(params, batch)
        params, batch = {k: p.clone() for k, p in params.items()}, batch.clone()
        oracle.assert_close(out.grads, oracle.clipped_sum(oracle.per_example_grads(loss, params, batch), 0.5))

    def test_no_grad_around_the_call(self, strategy):
        def loss(params, x):
            return F.linear(x * params["v"], params["w"]).sin().sum()

        params, batch = matrix_and_vector()
        expected = oracle.clipped_sum(oracle.per_example_grads(loss, params, batch), 0.5)
        with torch.no_grad():
            out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(params, batch)
        oracle.assert_close(out.grads, expected)

    @pytest.mark.parametrize("off_first", [True, False])
    def test_no_grad_in_part_of_the_loss(self, strategy, off_first):
        def loss(params, x):
            y = F.linear(x, params["w"]).sin() if not off_first else 0
            with torch.no_grad():
                a = F.linear(x, params["w"]).sum() * (params["v"] * x).sum()
            return (y + F.linear(x, params["w"])).sum() * a + (params["v"] * x).sin().sum()

        assert_exact(loss, matrix_and_vector, strategy)


def assert_exact_in_inference_mode(loss, strategy):
    params, batch = matrix_and_vector()
    with torch.inference_mode(False):
        copies = {k: p.clone() for k, p in params.items()}, batch.clone()
        grads = oracle.per_example_grads(loss, *copies)
    out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(grads, 0.5))
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), grads)
    oracle.assert_close(pegrad.per_example_norm(loss, strategy=strategy)(*copies), [oracle.norms(grads)])


MODULE = nn.Linear(3, 2).double()
OUTSIDE = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))


def _without_graph(params, x):
    with torch.no_grad():
        return (params["weight"] * x).sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: MODULE(x).square().sum(),
        lambda p, x: (MODULE.weight.T * 2).sum() * x.sum(),
        lambda p, x: F.linear(x, MODULE.weight * 1).sum(),
        lambda p, x: functional_call(MODULE, p, (x,)).sum().detach(),
        _without_graph,
        lambda p, x: x.sum(),
        lambda p, x: torch.zeros((), dtype=torch.float64),
    ],
)
def test_a_loss_of_no_parameter_is_refused(loss, strategy):
    """Catches: gradients of zero under every strategy, so that training would run on noise alone."""
    assert_refused(loss, lambda: (dict(MODULE.named_parameters()), r(B, 3)), strategy, "does not depend on any leaf")
    params, batch = dict(MODULE.named_parameters()), r(B, 3)
    with pytest.raises(pegrad.LossError, match="functional_call"):
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy, microbatch_size=1)(params, batch)


@pytest.mark.parametrize("function", [pegrad.gradient_gram, pegrad.gradient_moments, pegrad.gradient_noise_scale])
def test_statistics_of_a_loss_of_no_parameter_are_refused(function):
    """Catches: a kernel of zeros."""
    with pytest.raises(pegrad.LossError, match="does not depend on any leaf"):
        function(lambda p, x: MODULE(x).sum())(dict(MODULE.named_parameters()), r(B, 3))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [0, 1, B])
def test_a_single_unused_leaf_is_allowed(strategy, size):
    """Catches: a guard that asks for every leaf; one that an empty batch sets off."""
    loss = pegrad.clipped_grad(lambda p, x: (p["w"] * x).sum(), clip_norm=1.0, strategy=strategy)
    params, batch = two_vectors()
    grads = loss(params, batch[:size]).grads
    assert (grads["v"] == 0).all()
    assert (grads["w"] != 0).all() or size == 0


@pytest.mark.parametrize("microbatch_size", [None, 1, 2])
def test_single_rows_may_reach_no_parameter_in_the_loop(microbatch_size):
    """Catches: a guard that asks row by row, or chunk by chunk, where a row has nothing to learn from."""

    def loss(params, x):
        return (params["w"] * x).sum() if x.sum() > 0 else x.new_zeros(())

    function = pegrad.clipped_grad(loss, clip_norm=1.0, strategy="naive", microbatch_size=microbatch_size)
    params = {"w": r(3)}
    batch = torch.tensor([[-1.0] * 3] * 3 + [[1.0] * 3], dtype=torch.float64)
    assert torch.allclose(function(params, batch).grads["w"], torch.full((3,), 3**-0.5, dtype=torch.float64))
    assert (function(params, batch[:0]).grads["w"] == 0).all()
    with pytest.raises(pegrad.LossError, match="does not depend on any leaf"):
        function(params, batch[:3])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: F.linear(x, OUTSIDE).sum() * (p["w"] * x).sum(),
        lambda p, x: F.linear(x, OUTSIDE * 2).sum() * (p["w"] * x).sum() * p["v"].sum(),
        lambda p, x: (x * (OUTSIDE * 2)).sum() * (p["w"] * x).sum(),
        lambda p, x: (x * (OUTSIDE * p["v"])).sum() * (p["w"] * x).sum(),
    ],
)
def test_what_the_loss_closes_over_is_a_constant_even_if_it_requires_a_gradient(loss, strategy):
    """Catches: what is made of a module's own weights taken for a parameter (`expects a non-empty TensorList`)."""
    assert_exact(loss, two_vectors, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_are_refused(strategy):
    """Catches: noise on parameters that were not to move."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    module[0].requires_grad_(False)

    def loss(params, x):
        return functional_call(module, params, (x,)).sum()

    frozen = r"params\['0.bias'\] is an nn.Parameter with requires_grad=False.*if p.requires_grad"
    batch = r(B, 3)
    assert_refused(loss, lambda: (dict(module.named_parameters()), batch), strategy, frozen, pegrad.LeafError)
    with pytest.raises(pegrad.LeafError, match=frozen):
        pegrad.dp_sgd(
            loss, pegrad.optim.sgd(0.1), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=2, strategy=strategy
        ).init(dict(module.named_parameters()), pegrad.random.key(0))
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert_exact(loss, lambda: (trainable, batch), strategy)
    assert_exact(loss, lambda: ({name: p.detach() for name, p in module.named_parameters()}, batch), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: torch.select_scatter(x[None].repeat(2, 1), p["w"], 0, 1).sin().sum(),
        lambda p, x: torch.select_scatter((x * p["v"]).outer(x), p["w"] * 2, -1, -1).sin().sum(),
        lambda p, x: (x * p["v"]).outer(x).select_scatter(index=0, dim=1, src=p["w"]).sin().sum(),
        lambda p, x: torch.select_scatter(p["w"].outer(p["v"]), x, 0, 1).sin().sum(),
        lambda p, x: torch.select_scatter(x.outer(x), x * p["w"], 0, 1).sin().sum(),
    ],
)
def test_select_scatter(loss, strategy):
    """Catches: `vmap`'s rule of it, which in plain autograd around it gives the source twice its gradient."""
    assert_exact(loss, two_vectors, strategy)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since torch 2.13")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_in_chunks(reduction, strategy):
    """Catches: zeros from an operation that asks its arguments whether they require a gradient."""

    def loss(params, example, options=None):
        x, y = example
        x = F.linear(x, params["v"])
        return F.linear_cross_entropy(x, params["w"], y, linear_bias=params["b"], reduction=reduction, options=options)

    def chunked(params, example):
        return loss(params, example, nn.LinearCrossEntropyOptions(batch_chunk_size=2))

    def make():
        return {"b": r(5), "v": r(3, 3), "w": r(5, 3)}, (r(B, 4, 3), torch.randint(0, 5, (B, 4)))

    assert_exact(chunked, make, strategy, of=loss)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_asks_whether_a_tensor_requires_a_gradient(strategy):
    """Catches: a batched tensor that says no although its rows say yes, and a loss that takes another path for it."""

    def loss(params, x):
        hidden = params["w"] * x
        assert not x.requires_grad
        return hidden.sum() * 3 if hidden.requires_grad else hidden.sin().sum()

    assert_exact(loss, two_vectors, strategy)


def _mul_after_use(p, x):
    w = p["w"].clone()
    y = w * x
    w.mul_(10)
    return y.sum()


def _mul_between_uses(p, x):
    w = p["w"].clone()
    y = w * x
    w.mul_(10)
    return y.sum() + (w * x).sin().sum()


def _mul_after_linear(p, x):
    w = p["w"].clone()
    y = F.linear(x, w[None])
    w.mul_(10)
    return y.sum()


def _write_after_use(p, x):
    w = p["w"] * 1
    y = F.linear(x, w[None]).sum() + (p["w"] * x).sum()
    w[0] = 0.0
    return y


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", [_mul_after_use, _mul_between_uses, _mul_after_linear, _write_after_use])
def test_a_tensor_made_of_params_changed_after_its_use(loss, strategy):
    """Catches: a gradient brought to the leaves through the change, ten times too large."""
    if strategy in TRACED:
        message = "changes in place a tensor made of params, after (mul|linear) used it"
        assert_steps_down(loss, two_vectors, strategy, message)
    else:
        assert_exact(loss, two_vectors, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_place_changes_before_the_first_use_are_followed(strategy):
    """Catches: a guard that refuses what is right."""

    def loss(params, x):
        w = torch.zeros(2, 3, dtype=x.dtype)
        w[0] = params["w"]
        w[1:] = params["v"][None]
        w.mul_(2)
        return F.linear(x, w).sin().sum() + (x * w).cos().sum()

    assert_exact(loss, two_vectors, strategy)


def _double(t):
    with torch.no_grad():
        t.mul_(2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["params['w']", "batch['x']"])
def test_arguments_changed_in_place_are_refused(name, strategy):
    """Catches: the caller's tensors changed behind its back, and changed again by every further run."""

    def loss(params, example):
        y = params["w"].sum()
        _double(params["w"] if "w" in name else example["x"])
        return y * (params["w"] * example["x"]).sum()

    def make():
        return {"w": r(3)}, {"x": r(B, 3)}

    expected = f"changes {name} in place".replace("[", r"\[").replace("]", r"\]")
    assert_refused(loss, make, strategy, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_that_the_backward_pass_needs_may_not_change(strategy):
    """Catches: the changed value taken for the one that was used. The plain loop cannot either, in these words."""

    def loss(params, x):
        h = x * 2
        y = F.linear(h * params["v"], params["w"]).sum() + (params["w"] * h).sum()
        h.mul_(10)
        return y

    assert_refused(loss, matrix_and_vector, strategy, "modified by an inplace operation", RuntimeError)


class Through(torch.autograd.Function):
    """The identity, whatever it does to the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Sign(Through):
    @staticmethod
    def backward(ctx, g):
        return g.sign()


class Clamp(Through):
    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.1, 0.1)


class Offset(Through):
    @staticmethod
    def backward(ctx, g):
        return g + 1


class Transpose(Through):
    """Has the name of one of PyTorch's isometries."""

    @staticmethod
    def backward(ctx, g):
        return 3 * g


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("function", [Sign, Clamp, Offset, Transpose])
@pytest.mark.parametrize(
    "loss",
    [
        lambda f, p, x: (f(F.linear(x, p["w"])).sin() * p["v"].sum()).sum(),
        lambda f, p, x: (f(x * p["v"]).sin() * p["w"]).sum(),
        lambda f, p, x: F.linear(x, f(p["w"])).sin().sum() + p["v"].sum() * x.sum(),
        lambda f, p, x: F.linear(x, f(p["w"].T).T).sin().sum() + F.linear(x, f(p["w"])).sum() + p["v"].sum() * x.sum(),
        lambda f, p, x: (x * f(p["v"])).sin().sum() + F.linear(x, p["w"]).sum(),
    ],
)
def test_backward_functions_that_are_not_linear(loss, function, strategy):
    """Catches: weights multiplied into the loss (ghost), or a sum brought back to a leaf, through a sign or a clamp."""
    assert_exact(lambda p, x: loss(function.apply, p, x), matrix_and_vector, strategy)
    mask = torch.tensor([True, False, True, True])
    params, batch = matrix_and_vector()
    grads = oracle.per_example_grads(lambda p, x: loss(function.apply, p, x), params, batch[mask])
    out = pegrad.clipped_grad(lambda p, x: loss(function.apply, p, x), clip_norm=0.3, strategy=strategy)
    oracle.assert_close(out(params, batch, mask).grads, oracle.clipped_sum(grads, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ghost_stays_ghost_where_all_is_linear(dtype, monkeypatch):
    """Catches: a comparison so strict that rounding makes every call pay for two strategies."""

    def refuse(*_):
        raise AssertionError("book_keeping was called")

    monkeypatch.setattr(pegrad.BookKeeping, "clipped_sum", refuse)
    module = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)
    ).to(dtype)

    def loss(params, x):
        return functional_call(module, params, (x[None],)).logsumexp(1).sum()

    batch = torch.randn(16, 2, 8, 8).to(dtype)
    batch[3] *= 1e6
    batch[4] *= 1e-6
    batch[5] = float("nan")
    batch[6] = 0
    params = dict(module.named_parameters())
    for clip_norm in (1e-3, 1.0, 1e3):
        out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy="ghost")(params, batch)
        assert out.non_finite == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: F.linear(x, (5 * p["w"]).T.T).sin().sum() + p["v"].sum() * x.sum(),
        lambda p, x: (x * p["v"][None].expand(4, 3)).sin().sum() + F.linear(x, p["w"]).sum(),
        lambda p, x: F.linear(x, p["v"][None].expand(4, 3)).sin().sum() + F.linear(x, p["w"]).sum(),
        lambda p, x: F.linear(x, p["v"][None].expand(4, 3).reshape(12).view(4, 3)).sum() + F.linear(x, p["w"]).sum(),
        lambda p, x: F.linear(x, p["v"].as_strided((2, 2), (1, 1)).repeat(1, 2)[:, :3]).sum() + x.sum() * p["w"].sum(),
        lambda p, x: F.linear(x[:2], p["w"][:, :2] + p["w"][:, :2].T).sum() + (x * p["v"]).sum(),
        lambda p, x: F.linear(x, torch.cat([p["w"], p["w"]])).sin().sum() + (x * p["v"]).sum(),
        lambda p, x: F.linear(x, p["w"][[0, 0, 1]]).sin().sum() + (x * p["v"]).sum(),
        lambda p, x: (
            F.linear(x, p["w"].unbind()[1][None]).sum() + F.linear(x, p["w"][:1]).sin().sum() + (x * p["v"]).sum()
        ),
        lambda p, x: F.linear(x[:2], p["v"].diag()[1:, 1:]).sin().sum() + (x * p["w"].T.clone().T).sum(),
        lambda p, x: F.linear(x, p["w"].flip(0)).sin().sum() + F.linear(x[:2], p["v"].unfold(0, 2, 1)).sum(),
    ],
)
def test_only_isometries_are_taken_for_isometries(loss, strategy):
    """Catches: `MulBackward` or `ExpandBackward` in the list (norms off by 5, or 2), or any node with two paths."""
    assert_exact(loss, matrix_and_vector, strategy)


def test_lineage_reads_whole_names():
    """Catches: names compared by their beginning, and a user's node told from a leaf's by an attribute."""
    from pegrad.tracing.lineage import lineage

    leaf = r(2, 3).requires_grad_()
    leaves = {id(leaf): 0}

    class Variable(Through):
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.variable = torch.ones(1)

        backward = Transpose.backward

    for made, isometric, linear in [
        (leaf, True, True),
        (leaf.T[0].reshape(2, 1).squeeze(1), True, True),
        (leaf * 2, False, True),
        (leaf[None].expand(2, 2, 3), False, True),
        (Transpose.apply(leaf), False, False),
        (Variable.apply(leaf), False, False),
        (leaf.diagonal(), False, True),
    ]:
        line = lineage(made, leaves)
        assert (line.leaves, line.isometric, line.linear) == ({0}, isometric, linear)
    assert not lineage(r(2).requires_grad_(), leaves).leaves


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda p, x: p["w"].view(3),
        lambda p, x: p["w"] * 1,
        lambda p, x: p["w"] * x,
        lambda p, x: F.linear(x, p["w"][None]),
    ],
)
def test_hooks_on_gradients(make, strategy):
    """Catches: norms without the hook and sums with it."""

    def loss(params, x):
        made = make(params, x)
        made.register_hook(lambda g: 2 * g.clamp(-0.5, 0.5))
        return (made * x).sin().sum() + (params["v"] * x).sum()

    if strategy in TRACED:
        assert_steps_down(loss, two_vectors, strategy, "calls register_hook")
    else:
        assert_exact(loss, two_vectors, strategy)


def _swallow_branch(p, x):
    y = (p["w"] * x).sum()
    try:
        if x.sum() > 0:
            return y * 2
    except Exception:
        pass
    return y.sin()


def _swallow_item(p, x):
    y = (p["w"] * x).sum()
    try:
        scale = x.sum().item()
    except Exception:
        scale = 1.0
    return y * scale


def _swallow_write(p, x):
    y = torch.ones(3, dtype=x.dtype)
    try:
        y[0] = (p["w"] * x).sum()
    except RuntimeError:
        y = p["w"]
    return (y * x).sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", [_swallow_branch, _swallow_item, _swallow_write])
def test_errors_of_a_transform_that_the_loss_swallows(loss, strategy):
    """Catches: a path that the plain loop would not take, since `except Exception` caught the transform's error."""
    if strategy == "naive" or strategy in TRACED:
        assert_exact(loss, two_vectors, strategy)
    else:
        assert_refused(loss, two_vectors, strategy, "strategy='naive'")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_that_the_plain_loop_raises_too_may_be_swallowed(strategy):
    """Catches: a guard that refuses an ordinary fallback."""

    def loss(params, x):
        y = (params["w"] * x)[None].expand(2, 3).T
        try:
            y = y.view(6)
        except RuntimeError:
            y = y.reshape(6)
        return y.sin().sum()

    assert_exact(loss, two_vectors, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_our_own_refusals_cannot_be_swallowed(strategy):
    """Catches: batch normalisation left out in silence."""

    def loss(params, x):
        y = params["w"] * x
        with contextlib.suppress(Exception):
            y = F.batch_norm(y[None, :, None], None, None, training=True)
        return y.sum()

    assert_refused(loss, two_vectors, strategy, "batch normalisation")


def _nested_grad(p, x):
    return torch.func.grad(lambda x: F.linear(x * p["v"], p["w"]).sin().sum())(x).square().sum()


def _nested_grad_beside_a_use(p, x):
    return _nested_grad(p, x) + F.linear(x, p["w"]).sin().sum() * p["v"].sum()


def _nested_grad_by_a_parameter(p, x):
    return torch.func.grad(lambda w: F.linear(x * p["v"], w).sin().sum())(p["w"]).square().sum()


def _nested_vmap(p, x):
    return torch.func.vmap(lambda s: F.linear(s * x * p["v"], p["w"]).sin().sum())(x.outer(x)).square().sum()


def _nested_vmap_over_a_parameter(p, x):
    return torch.func.vmap(lambda w: (w * x * p["v"]).sin().sum())(p["w"]).square().sum()


def _nested_jvp(p, x):
    return torch.func.jvp(lambda x: F.linear(x * p["v"], p["w"]).sin().sum(), (x,), (x,))[1]


def _nested_jacrev(p, x):
    return torch.func.jacrev(lambda x: F.linear(x, p["w"]).sin() * p["v"].sum())(x).square().sum()


def _nested_hessian(p, x):
    return torch.func.hessian(lambda x: F.linear(x, p["w"]).sin().sum() * p["v"].sum())(x).square().sum()


def _made_then_nested(p, x):
    w = p["w"].T * 2
    return torch.func.grad(lambda x: (x @ w).sin().sum() * p["v"].sum())(x).square().sum() + (x @ w).sum()


def _nested_autograd(p, x):
    y = p["w"] * x
    (g,) = torch.autograd.grad(y.sin().sum(), y, create_graph=True)
    return g.square().sum() + p["v"].sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "loss",
    [
        _nested_grad,
        _nested_grad_beside_a_use,
        _nested_grad_by_a_parameter,
        _nested_vmap,
        _nested_vmap_over_a_parameter,
        _nested_jvp,
        _nested_jacrev,
        _nested_hessian,
        _made_then_nested,
        _nested_autograd,
    ],
)
def test_transforms_inside_the_loss(loss, strategy):
    """Catches: rules applied at the wrong level (an obscure error), or uses inside that nobody noticed."""
    assert_exact(loss, matrix_and_vector, strategy)


def _checkpoint(p, x, use_reentrant=False):
    def inner(x, w):
        return (w * x).sin().sum()

    return torch.utils.checkpoint.checkpoint(inner, x, p["w"], use_reentrant=use_reentrant)


def _backward(p, x):
    y = (p["w"] * x).sum()
    y.backward()
    return y


def _write_into_shared(p, x):
    y = torch.zeros(3, dtype=x.dtype)
    y[0] = (p["w"] * x).sum()
    return y.sum()


def _write_into_made(p, x):
    y = p["w"].clone()
    y[0] = x.sum()
    return (y * x).sum()


def _mul_into_made(p, x):
    y = p["w"].clone()
    y *= x
    return y.sum()


def _branch(p, x):
    y = (p["w"] * x).sum()
    return y * 2 if x.sum() > 0 else y


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, x: _checkpoint(p, x, use_reentrant=True), "use_reentrant=True"),
        (_backward, "backward through the graph a second time"),
    ],
)
def test_what_the_plain_loop_cannot_do_either_is_said_in_its_words(loss, message, strategy):
    """Catches: a strategy that answers where not even the loop can, or takes the blame for the loss."""
    assert_refused(loss, two_vectors, strategy, message, RuntimeError)


@pytest.mark.parametrize(
    ("loss", "message", "strategies"),
    [
        pytest.param(
            *(_checkpoint, "torch.utils.checkpoint", STRATEGIES),
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 leaves its hooks in force"),
        ),
        (_write_into_shared, "writes in place to a shared tensor", TRANSFORMED),
        (_write_into_made, "writes", TRANSFORMED),
        (_mul_into_made, "writes", TRANSFORMED),
        (_branch, "asks a tensor for its value", TRANSFORMED),
    ],
)
def test_what_no_transform_can_do_is_explained(loss, message, strategies):
    """Catches: a raw error of PyTorch's in words of its own, and a strategy that answers where it cannot."""
    for strategy in STRATEGIES:
        if strategy in strategies:
            (assert_refused if strategies == STRATEGIES else assert_steps_down)(loss, two_vectors, strategy, message)
        else:
            assert_exact(loss, two_vectors, strategy)
