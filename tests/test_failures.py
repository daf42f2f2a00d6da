"""Failures that are not pegrad's own are the loss's, and stay as they are, or the strategy's, and say so."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad
from torch.utils.checkpoint import checkpoint

import oracle
import pegrad
from pegrad.strategies import naive
from pegrad.torch_internals import transformed

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

PARAMS = {"w": torch.ones(3)}
SECRET = 271828.0
BATCH = torch.tensor([[1.0, 2.0, 3.0], [SECRET, 5.0, 6.0]])
VECTORISED = ["vmap", "grouped_conv", "ghost", "book_keeping", "auto"]
TRANSFORMED = ["vmap", "grouped_conv"]


def branches(params, x):
    y = (params["w"] * x).sum()
    return y.sin() if y > 7 else y.cos()


class Doubled(torch.autograd.Function):
    """As functions were written before torch.func: without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def questions(strategy):
    """Every way to ask for something that runs the loss."""
    return [
        lambda loss, params, batch: pegrad.per_example_grad(loss, strategy=strategy)(params, batch),
        lambda loss, params, batch: pegrad.per_example_norm(loss, strategy=strategy)(params, batch),
        lambda loss, params, batch: pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch),
        lambda loss, params, batch: pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy, microbatch_size=1)(
            params, batch
        ),
    ]


@pytest.mark.parametrize("strategy", TRANSFORMED)
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (branches, "asks a tensor for its value"),
        (lambda p, x: torch.rrelu(p["w"] * x, training=True).sum(), "aten::rrelu"),
        (lambda p, x: (p["w"] * x)[x > 2].sum(), "size depends on the example"),
    ],
)
def test_what_only_the_loop_can_run_is_the_strategys_failure(loss, reason, strategy):
    """Catches: functorch's error, which tells of a vmap that the user never called."""
    for ask in questions(strategy):
        with pytest.raises(pegrad.StrategyError, match=reason) as caught:
            ask(loss, PARAMS, BATCH)
        assert "strategy='naive'" in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert not isinstance(caught.value.__cause__, pegrad.PegradError)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: Doubled.apply(p["w"] * x).sin().sum(),
        lambda p, x: torch.tensor_split(p["w"] * x, torch.tensor([1]))[0].sin().sum(),
    ],
)
def test_the_loop_runs_what_no_transform_can(loss):
    """Catches: sending the user to a strategy that fails in the same way."""
    for strategy in TRANSFORMED:
        with pytest.raises(pegrad.StrategyError, match="strategy='naive'"):
            pegrad.per_example_grad(loss, strategy=strategy)(PARAMS, BATCH)
    expected = oracle.per_example_grads(loss, PARAMS, BATCH)
    params, batch = oracle.double(PARAMS), BATCH.double()
    oracle.assert_close(pegrad.per_example_grad(loss, strategy="naive")(params, batch), expected)
    out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy="naive")(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 0.5))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_loop_holds_the_gradients_of_few_examples(size, monkeypatch):
    """Catches: the stacked gradients of a batch held for a sum, or the parts of it put together wrongly."""
    monkeypatch.setattr(naive, "BLOCK", size * 3)
    batch = torch.randn(5, 3, dtype=torch.float64)
    loss, params = (lambda p, x: ((p["w"] * x).sin().sum(), x)), {"w": PARAMS["w"].double()}
    mask = torch.tensor([True, True, False, True, False])
    grads = oracle.per_example_grads(loss, params, batch)
    out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy="naive")(params, batch, mask)
    oracle.assert_close(out.grads, oracle.clipped_sum([grads[0][mask]], 0.5))
    oracle.assert_close(out.aux, [batch * mask[:, None]])
    oracle.assert_close(pegrad.per_example_norm(loss, strategy="naive")(params, batch), [oracle.norms(grads)])


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p, x: p["weight"] * x, KeyError, "weight"),
        (lambda p, x: (p["w"] @ x[:2]).sum(), RuntimeError, "inconsistent tensor size"),
        (lambda p, x: F.nll_loss(p["w"], torch.tensor(7)), IndexError, "Target 7 is out of bounds"),
    ],
)
def test_the_losss_own_error_stays_as_it_is(loss, error, message, strategy):
    """Catches: a mistake in the loss, reported as pegrad's or as functorch's."""
    for ask in questions(strategy):
        with pytest.raises(error, match=message) as caught:
            ask(loss, PARAMS, BATCH)
        assert not isinstance(caught.value, pegrad.PegradError)


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
def test_an_error_of_a_later_example_is_the_losss_too(strategy):
    """Catches: a token out of range in the second row, for which the strategy was blamed since the first row ran."""
    tokens = torch.tensor([[0, 1], [2, 99]])
    with pytest.raises(IndexError, match="index out of range"):
        pegrad.per_example_grad(lambda p, x: F.embedding(x, p["e"]).sum(), strategy=strategy)(
            {"e": torch.ones(3, 2)}, tokens
        )


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping", "auto"])
def test_a_loss_that_calls_autograd_itself(strategy):
    """Catches: the loop run without a graph on the later rows, and its failure there taken for the loss's own."""

    def loss(p, x):
        y = torch.tensor_split(p["w"] * x, torch.tensor([1]))[0].sum()
        return torch.autograd.grad(y * y, p["w"], create_graph=True)[0].sum()

    params, batch = oracle.double(PARAMS), BATCH.double()
    found = pegrad.per_example_grad(loss, strategy=strategy)(params, batch)
    oracle.assert_close(found, oracle.per_example_grads(loss, params, batch))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda p, x: (p["w"] * x).tolist()[0] * p["w"].sum(), r"\.tolist\(\)"),
        (lambda p, x: (p["w"] * torch.from_numpy(x.numpy())).sum(), r"\.numpy\(\)"),
        pytest.param(
            lambda p, x: checkpoint(lambda t: (t * p["w"]).sin(), x, use_reentrant=False).sum(),
            r"torch\.utils\.checkpoint",
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 leaves its hooks in force"),
        ),
    ],
)
def test_reasons_are_in_words_of_a_loss(loss, reason):
    """Catches: 'escaped from inside a function being vmapped', which tells of nothing that a loss knows."""
    with pytest.raises(pegrad.StrategyError, match=reason):
        pegrad.per_example_grad(loss, strategy="vmap")(PARAMS, BATCH)


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
def test_errors_that_the_loss_raises_itself_come_through(strategy):
    """Catches: a user's own exception class lost on the way."""

    class Mine(Exception):
        pass

    def loss(params, x):
        raise Mine("stop")

    with pytest.raises(Mine, match="stop") as caught:
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(PARAMS, BATCH)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("strategy", VECTORISED)
def test_no_example_is_in_the_message(strategy):
    """Catches: private data in a message, where a loss puts them into an exception that only a strategy sees."""

    def loss(params, x):
        if transformed():
            raise ValueError(f"cannot compare {SECRET}")
        return (params["w"] * x).sum()

    function = pegrad.per_example_grad(loss, strategy=strategy)
    if strategy == "auto":
        with pytest.warns(pegrad.FallbackWarning) as warned:
            function(PARAMS, BATCH)
        message = str(warned[0].message)
    else:
        with pytest.raises(pegrad.StrategyError) as caught:
            function(PARAMS, BATCH)
        message = str(caught.value)
    assert str(SECRET) not in message
    assert "ValueError" in message


@pytest.mark.parametrize("strategy", VECTORISED)
def test_running_out_of_memory_is_not_the_strategys_fault(strategy):
    """Catches: advice to use a loop, where a smaller micro-batch is what helps."""

    def loss(params, x):
        if transformed():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (params["w"] * x).sum()

    with pytest.raises(torch.OutOfMemoryError):
        pegrad.per_example_grad(loss, strategy=strategy)(PARAMS, BATCH)


def test_the_error_is_a_builtin_one_as_well():
    """Catches: `except RuntimeError`, which caught these failures before, left with nothing to catch."""
    assert issubclass(pegrad.StrategyError, pegrad.PegradError)
    assert issubclass(pegrad.StrategyError, RuntimeError)


@pytest.mark.parametrize("strategy", VECTORISED)
def test_an_interruption_is_let_through(strategy):
    """Catches: the loop run once more after the user has asked to stop."""

    def loss(params, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pegrad.per_example_grad(loss, strategy=strategy)(PARAMS, BATCH)


@pytest.mark.parametrize("strategy", ["vmap", "grouped_conv", "auto"])
def test_under_a_transform(strategy):
    """Catches: the plain loop run where plain autograd is not allowed."""

    def penalty(params, loss):
        return sum(g.sum() for g in pegrad.per_example_grad(loss, strategy=strategy)(params, BATCH).values())

    with pytest.raises(pegrad.StrategyError, match="'naive'"):
        grad(penalty)(PARAMS, branches)
    with pytest.raises(KeyError, match="weight"):
        grad(penalty)(PARAMS, lambda p, x: (p["weight"] * x).sum())


@pytest.mark.parametrize("strategy", VECTORISED)
@pytest.mark.parametrize("call", [torch.as_strided, torch.Tensor.as_strided, torch.as_strided_copy])
def test_memory_is_not_read_across_examples(call, strategy):
    """Catches: `as_strided` under `vmap`, which reads another example's numbers where the examples interleave."""

    def loss(p, x):
        return call(x * p, (2, 2), (1, 2)).sin().sum()

    batch, params = torch.randn(3, 3, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    function = pegrad.per_example_grad(loss, strategy=strategy)
    interleaved = batch.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = oracle.per_example_grads(loss, params, batch)
    if strategy == "auto":
        with pytest.warns(pegrad.FallbackWarning, match="do not lie one after the other"):
            oracle.assert_close(function(params, interleaved), expected)
    else:
        with pytest.raises(pegrad.StrategyError, match="make the batch's leaves contiguous"):
            function(params, interleaved)
    oracle.assert_close(function(params, interleaved.contiguous()), expected)
    oracle.assert_close(pegrad.per_example_grad(loss, strategy="naive")(params, interleaved), expected)
