"""An LSTM in a graph: two operations a layer and direction, and the kernel that runs them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import pegrad
from pegrad import optim, trees
from pegrad.compiling import lstm as kernel
from pegrad.compiling.backends import Backend
from pegrad.rules.recurrent import lstm as plain

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's own, as it is loaded

OPS = torch.ops.pegrad


def r(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def forward(n, steps, size, dtype=torch.float32):
    """What an LSTM's steps are given."""
    return (
        r(n, steps, 4 * size, dtype=dtype),
        r(4 * size, dtype=dtype),
        *r(2, n, size, dtype=dtype),
        weight(size, dtype),
    )


def weight(size, dtype=torch.float32):
    return r(4 * size, size, dtype=dtype) / size**0.5


def back(given, backwards, output=None):
    """What the way back is given, after the way forward."""
    gates, _, cell, squashed = plain.run(*given, backwards)
    n, steps, size = squashed.shape[1], *squashed.shape[::2]
    output = r(n, steps, size, dtype=gates.dtype) if output is None else output
    return gates, cell, squashed, output, *r(2, n, size, dtype=gates.dtype), given[-1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_operations_are_sound(backwards):
    """Catches: a fake whose tensors lie otherwise in memory than those that the operation returns."""
    given = forward(3, 4, 5, torch.float64)
    after = back(given, backwards)
    for operation, arguments in (
        (OPS.lstm, given),
        (OPS.compiled_lstm, given),
        (OPS.lstm_back, after),
        (OPS.compiled_lstm_back, after),
    ):
        torch.library.opcheck(operation.default, (*arguments, backwards))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 33])
def test_the_kernel_gives_what_the_operations_give(n, backwards):
    """Catches: a row, a column, a gate or a step that is left out, taken twice or taken for another."""
    size = 2 * kernel._library().lstm_columns()
    for steps in (1, 5):
        given = forward(n, steps, size)
        assert_close(OPS.compiled_lstm(*given, backwards), OPS.lstm(*given, backwards))
        for output in (None, r(steps, n, size).transpose(0, 1), torch.ones(()).expand(n, steps, size)):
            after = back(given, backwards, output)
            assert_close(OPS.compiled_lstm_back(*after, backwards), OPS.lstm_back(*after, backwards))


def assert_close(given, wanted):
    for some, others in zip(given, wanted, strict=True):
        assert some.is_contiguous()
        torch.testing.assert_close(some, others, rtol=1e-5, atol=1e-6)


def test_the_kernel_keeps_what_it_is_given():
    """Catches: what a graph needs yet, written over."""
    given = forward(3, 4, kernel._library().lstm_columns())
    for operation, arguments in ((OPS.compiled_lstm, given), (OPS.compiled_lstm_back, back(given, False))):
        before = [t.clone() for t in arguments]
        operation(*arguments, False)
        assert all(map(torch.equal, arguments, before))


@pytest.mark.parametrize(("size", "dtype"), [(5, torch.float32), (64, torch.float64)])
def test_what_the_kernel_cannot_take_runs_as_it_is(size, dtype):
    given = forward(3, 4, size, dtype)
    after = back(given, False)
    assert all(map(torch.equal, OPS.compiled_lstm(*given, False), OPS.lstm(*given, False)))
    assert all(map(torch.equal, OPS.compiled_lstm_back(*after, False), OPS.lstm_back(*after, False)))


def made(size, **options):
    module = nn.LSTM(3, size, 2, batch_first=True, bidirectional=True, **options)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params, x):
        return functional_call(module, params, (x,))[0].square().sum()

    return loss, params, r(6, 7, 3)


def nodes(compiled):
    (graph,) = compiled._graphs.values()
    return [node.target for node in graph.recording.graph.graph.nodes]


def test_a_graph_has_two_operations_a_layer_and_direction():
    """Catches: a graph of every step's operations, which takes a compiler minutes."""
    loss, params, batch = made(5)
    clipped = pegrad.clipped_grad(loss, clip_norm=0.1)
    compiled = pegrad.compile(clipped, params, batch, backend="eager")
    found = nodes(compiled)
    assert found.count(OPS.lstm.default) == found.count(OPS.lstm_back.default) == 4
    given, wanted = compiled(params, batch), clipped(params, batch)
    assert all(map(torch.equal, trees.leaves(given.grads), trees.leaves(wanted.grads)))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_projected_one_is_recorded_step_by_step():
    loss, params, batch = made(5, proj_size=2)
    compiled = pegrad.compile(pegrad.clipped_grad(loss, clip_norm=0.1), params, batch, backend="eager")
    assert OPS.lstm.default not in nodes(compiled)


def test_inductor_is_given_the_kernel(monkeypatch):
    """Catches: a compiler that is given the operations themselves, or a graph that is changed for others too."""
    given = forward(3, 4, kernel._library().lstm_columns())
    graph = make_fx(lambda *given: OPS.lstm(*given, True))(*given)
    asked, fits = [], kernel._fits
    monkeypatch.setattr(kernel, "_fits", lambda *given: asked.append(fits(*given)) or asked[-1])
    compiled = Backend("inductor")(graph, given)
    asked.clear()
    assert_close(compiled(*given), OPS.lstm(*given, True))
    assert asked == [True]
    graph(*given)
    assert asked == [True]


@pytest.mark.slow
def test_a_step_by_the_kernel(monkeypatch):
    loss, params, batch = made(kernel._library().lstm_columns())
    step = pegrad.dp_sgd(loss, optim.sgd(0.1), clip_norm=0.1, noise_multiplier=1.0, expected_batch_size=6)
    state = step.init(params, pegrad.random.key(0))
    asked, fits = [], kernel._fits
    monkeypatch.setattr(kernel, "_fits", lambda *given: asked.append(fits(*given)) or asked[-1])
    compiled = pegrad.compile(step, params, state, batch, backend="inductor")
    asked.clear()
    given, wanted = compiled(params, state, batch), step(params, state, batch)
    assert asked == [True] * 8
    torch.testing.assert_close(given.params, wanted.params)
