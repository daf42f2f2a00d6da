"""Recurrent networks: every option, every result, under every strategy; and what they are put through."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import oracle
import pegrad
from hostile import Attack, movement
from pegrad.reductions.guarded import Magnitudes
from pegrad.rules import gram
from pegrad.rules.recurrent import calls

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

B, T, D, H = 3, 4, 3, 2
ALIKE = "book_keeping", "grouped_conv", "naive"  # they run what ghost, vmap and the loop itself run
STRATEGIES = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in pegrad.STRATEGIES]
TRACED = ["ghost", "book_keeping", "auto"]
VECTORISED = [name for name in pegrad.STRATEGIES if name != "naive"]
KINDS = {
    "lstm": nn.LSTM,
    "projected lstm": lambda d, h, *layers, **options: nn.LSTM(d, h + 1, *layers, proj_size=h, **options),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "without biases": {"bias": False},
    "everything": {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    "all but that": {"num_layers": 2, "bidirectional": True},
}
EXAMPLES = {"unbatched": (T, D), "batches of one": (T, 1, D), "several": (T, 2, D)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def of(module):
    """Parameters; those of rectifiers are positive, so that some are at work in every direction and layer."""
    relu = getattr(module, "nonlinearity", "") == "relu"
    with torch.no_grad():
        return {name: p.abs_().detach() if relu else p.detach() for name, p in module.double().named_parameters()}


def flat(results):
    """The output and the last states, whatever a module returns."""
    output, states = results
    return [output, *(states if isinstance(states, tuple) else (states,))]


def total(*results):
    """A number on which no two numbers of the results have the same influence."""
    return sum(((y + torch.arange(y.numel()).view(y.shape) / 7).sin() * (i + 1)).sum() for i, y in enumerate(results))


def assert_exact(loss, params, batch, strategy):
    grads = oracle.per_example_grads(loss, params, batch)
    norms = oracle.norms(grads)
    assert norms.max() > 0
    clip_norm = norms.max().item() / 2
    out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(grads, clip_norm))
    oracle.assert_close(out.norms, [norms])
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), grads)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind, option, strategy):
    """Catches: weights read in the wrong order, a direction the wrong way round, a layer fed by the wrong one."""
    module = KINDS[kind](D, H, **OPTIONS[option])

    def loss(params, x):
        return total(*flat(functional_call(module, params, (x,))))

    for shape in EXAMPLES.values():
        assert_exact(loss, of(module), r(B, *shape), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_in_any_combination(kind, strategy):
    """Catches: a gradient that one of the results does not get, or gets only beside another."""
    module = KINDS[kind](D, H, 2, bidirectional=True)
    x = r(B, T, D)
    picks = [
        lambda y: y[:1],
        lambda y: y[1:2],
        lambda y: y[-1:],
        lambda y: [y[0][0]],
        lambda y: [y[0][-1, :1], y[1][0]],
        lambda y: [y[-1][3], y[0][1:3]],
        lambda y: [*y, y[0].flip(0)],
    ]
    for pick in picks:

        def loss(p, x, pick=pick):
            return total(*pick(flat(functional_call(module, p, (x,)))))

        assert_exact(loss, of(module), x, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_first_states_of_any_origin(kind, strategy):
    """Catches: gradients that do not pass through the first states, of examples, params, constants and any mixture."""
    module = KINDS[kind](D, H, 2, bidirectional=True)
    sizes = [H, H + 1 if kind == "projected lstm" else H][: 2 if "lstm" in kind else 1]
    shared, own = [r(4, size) for size in sizes], [r(B, 4, size) for size in sizes]
    params = {"module": of(module), "states": [r(4, size) for size in sizes], "w": r(D, 4)}

    def origins(p, x, states):
        yield shared
        yield states
        yield p["states"]
        yield [s * 2 for s in p["states"]]
        yield [(x[0] @ p["w"])[:, None] + s for s in p["states"]]
        yield [p["states"][0], *shared[1:]]
        yield [shared[0], *states[1:]]

    for i in range(7):

        def loss(p, example, i=i):
            states = tuple([*origins(p, *example)][i])
            hx = states if len(states) > 1 else states[0]
            return total(*flat(functional_call(module, p["module"], (example[0], hx))))

        assert_exact(loss, params, (r(B, T, D), own), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, strategy):
    """Catches: a cell whose gates are in another order, or that needs what differs from example to example."""
    cell = CELLS[kind](D, H, bias=bias)
    params = {"cell": of(cell), "state": r(H), "w": r(D)}

    def steps(p, xs, first=None):
        states = first
        for x in xs:
            states = functional_call(cell, p["cell"], (x, states))
        return states if isinstance(states, tuple) else (states,)

    def first(state):
        return (state, state * 2) if kind == "lstm" else state

    batch = r(B, T, D)
    assert_exact(lambda p, xs: total(*steps(p, xs)), params, batch, strategy)
    assert_exact(lambda p, xs: total(*steps(p, xs[:1], first(p["state"]))), params, batch, strategy)
    assert_exact(lambda p, xs: total(*steps(p, xs[:, None].expand(T, 2, D))), params, batch, strategy)
    assert_exact(lambda p, xs: total(*steps(p, [p["w"]], first(xs[0, :H]))), params, batch, strategy)
    assert_exact(lambda p, xs: total(*steps(p, [torch.ones(D).double()], first(xs[0, :H]))), params, batch, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_partly_frozen(kind, strategy):
    """Catches: a constant weight taken for a parameter; one that has a gradient only beside another."""
    module = KINDS[kind](D, H, 2)
    params, x = of(module), r(B, T, D)
    subsets = [[name] for name in params] + [[n for n in params if n != name] for name in params]
    subsets += [[n for n in params if "_l1" in n], [n for n in params if "bias" in n], [n for n in params if "hh" in n]]
    for names in subsets:
        trained = {name: params[name] for name in names}  # the rest are the module's own, and require a gradient
        assert_exact(lambda p, x: total(*flat(functional_call(module, p, (x,)))), trained, x, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_called_twice_and_weights_that_two_share(kind, strategy):
    """Catches: a second use that replaces the first; a norm of one use alone."""
    one, two = KINDS[kind](H, H, 2), KINDS[kind](H, H)
    params, names = of(one), [*of(two)]

    def loss(p, x):
        output, *states = flat(functional_call(one, p, (x,)))
        again = flat(functional_call(one, p, (output.flip(0), states[0] if len(states) == 1 else tuple(states))))
        shared = {name: p[name.replace("l0", "l1")] for name in names}
        return total(output, *again, *flat(functional_call(two, shared, (output,))))

    assert_exact(loss, params, r(B, T, H), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_made_of_params(kind, strategy):
    """Catches: a weight that is no leaf, normalised, scaled, sliced or cast, taken for a constant."""
    module = KINDS[kind](D, H)
    params = of(module)

    def made(p):
        rows = {n: F.normalize(w, dim=-1) if w.dim() == 2 else w * 2 for n, w in p.items() if n != "all"}
        return {**rows, "bias_hh_l0": p["all"][: len(p["bias_hh_l0"])]}

    params["all"] = r(20)
    assert_exact(lambda p, x: total(*flat(functional_call(module, made(p), (x,)))), params, r(B, T, D), strategy)


class Doubled(torch.autograd.Function):
    """Linear, but who is to know."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_differ_from_example_to_example(kind, strategy):
    """Catches: one example's weights used for all. A user's function between a parameter and its use makes copies."""
    module = KINDS[kind](D, H, bidirectional=True)
    params = of(module)
    for name in params:

        def loss(p, x, name=name):
            return total(*flat(functional_call(module, {**p, name: Doubled.apply(p[name])}, (x,))))

        assert_exact(loss, params, r(B, T, D), strategy)

        def by_example(p, x, name=name):
            return total(*flat(functional_call(module, {**p, name: p[name] * x[0, 0]}, (x,))))

        assert_exact(by_example, params, r(B, T, D), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_changed_in_place(kind, strategy):
    """Catches: what the way back needs overwritten by the loss; results that share memory; views that refuse it."""
    module = KINDS[kind](D, H, 2)

    def loss(p, x):
        output, *states = flat(functional_call(module, p, (x,)))
        output.mul_(output + 1)
        output[0] = 3.0
        for state in states:
            state.sin_().mul_(2)
        return total(output, *states)

    assert_exact(loss, of(module), r(B, T, D), strategy)
    assert_exact(loss, of(module), r(B, T, 2, D), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_use_that_the_loss_does_not_depend_on(kind, strategy):
    """Catches: a leaf that waits for ever for a use that was announced under no_grad, or detached."""
    module = KINDS[kind](D, H, 2)

    def loss(p, x):
        with torch.no_grad():
            factor = functional_call(module, p, (x.flip(0),))[0].square().sum()
        output = functional_call(module, p, (x,))[0]
        return (output * functional_call(module, p, (x * 2,))[0].detach()).sin().sum() * factor

    assert_exact(loss, of(module), r(B, T, D), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_module(kind, strategy):
    """Catches: a module that dynamo replays without what is noted while it runs."""
    module = KINDS[kind](D, H, 2)
    params = of(module)
    compiled = torch.compile(module, backend="eager")
    batch = r(B, T, D)
    expected = oracle.per_example_grads(lambda p, x: total(*flat(functional_call(module, p, (x,)))), params, batch)

    def loss(p, x):
        return total(*flat(functional_call(compiled, {f"_orig_mod.{n}": w for n, w in p.items()}, (x,))))

    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind, strategy):
    """Catches: one step, one channel, one example, an input that all share or that is a parameter."""
    tiny = KINDS[kind](1, 1)
    assert_exact(lambda p, x: total(*flat(functional_call(tiny, p, (x,)))), of(tiny), r(B, 1, 1), strategy)
    module = KINDS[kind](D, H, 2, bidirectional=True)
    assert_exact(lambda p, x: total(*flat(functional_call(module, p, (x,)))), of(module), r(1, T, D), strategy)

    def no_sequences(p, x):
        return (
            total(*flat(functional_call(module, p, (x[:, None][:, :0],)))) + sum(w.sum() for w in p.values()) * x.sum()
        )

    assert_exact(no_sequences, of(module), r(B, T, D), strategy)
    params, fixed = {"module": of(module), "x": r(T, D)}, r(T, D)
    for given in (lambda p: fixed, lambda p: p["x"], lambda p: p["x"] * 2):

        def loss(p, x, given=given):
            states = x[:4, :H] if kind in ("gru", "tanh", "relu") else (x[:4, :H], x[:4, :H].sin())
            if kind == "projected lstm":
                states = states[0], x[:4]
            return total(*flat(functional_call(module, p["module"], (given(p), states))))

        assert_exact(loss, params, r(B, 4, 3), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_empty_batches(kind, strategy):
    """Catches: rows that the mask leaves out, in the sums; an empty batch of a strange shape."""
    module = KINDS[kind](D, H, 2)

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    params, batch = of(module), r(B, T, D)
    function = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)
    kept = torch.tensor([True, False, True])
    expected = oracle.clipped_sum(oracle.per_example_grads(loss, params, batch[kept]), 1.0)
    oracle.assert_close(function(params, batch, kept).grads, expected)
    assert all((g == 0).all() for g in function(params, batch[:0]).grads.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200, -1e308])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_or_huge_leaves_the_others_alone(kind, value, strategy):
    """Catches: zero times infinity, anywhere between an example's input and the sum over all."""
    module = KINDS[kind](D, H, 2, bidirectional=True)

    def loss(p, x):
        return sum(y.square().sum() for y in flat(functional_call(module, p, (x,))))

    params, batch = of(module), r(B, T, D)
    batch[1, 2] = value
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    others = oracle.clipped_sum(oracle.per_example_grads(loss, params, batch[[0, 2]]), 1.0)
    (row,) = zip(*oracle.per_example_grads(loss, params, batch[1:2]), strict=True)
    finite = bool(torch.isfinite(oracle.norms([g[None] for g in row])))
    # Where squares overflow, a traced strategy cannot tell how large a gradient is, and counts it among the others.
    assert out.non_finite == (not finite) or (strategy in TRACED and abs(value) > 1e100 and out.non_finite)
    if not out.non_finite:
        others = [a + b for a, b in zip(others, oracle.clipped_sum([g[None] for g in row], 1.0), strict=True)]
    oracle.assert_close(out.grads, others)


@pytest.mark.parametrize("strategy", VECTORISED)
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind, strategy, monkeypatch):
    """Catches: dropout before the first layer, after the last, or in a module that does not train."""
    module = KINDS[kind](D, H, 2, dropout=0.25)
    mask = torch.tensor([[0.0, 2.0], [2.0, 2.0], [0.0, 0.0], [2.0, 0.0]])[None].double()
    rates = []

    def dropped(x, p):
        rates.append(p)
        return x * mask

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    params, batch = of(module), r(B, T, D)
    layers = [KINDS[kind](size, H) for size in (D, H)]

    def by_hand(p, x):
        first, second = ({n.replace(f"l{i}", "l0"): w for n, w in p.items() if f"_l{i}" in n} for i in range(2))
        x, *last = flat(functional_call(layers[0], first, (x,)))
        x, *states = flat(functional_call(layers[1], second, (x * mask[0],)))
        return total(x, *(torch.cat(pair) for pair in zip(last, states, strict=True)))

    with monkeypatch.context() as patch:
        patch.setattr(calls.F, "dropout", dropped)
        found = pegrad.per_example_grad(loss, strategy=strategy)(params, batch)
    oracle.assert_close(found, oracle.per_example_grads(by_hand, params, batch))
    assert set(rates) == {0.25}
    outputs = pegrad.per_example_value_and_grad(
        lambda p, x: (loss(p, x), functional_call(module, p, (x,))[0]), strategy=strategy
    )(params, batch[:1].expand(40, T, D))
    assert len(outputs.aux.flatten(1).unique(dim=0)) > 5  # each example draws its own
    module.eval()
    assert_exact(loss, params, batch, strategy)


LENGTHS = torch.tensor([4, 1, 2])


def masked(module):
    def loss(p, example):
        x, length = example
        output = functional_call(module, p, (x,))[0]
        return ((output.sin().sum(-1) + torch.arange(T)) ** 2 * (torch.arange(T) < length)).sum()

    return loss


def packed(module):
    def loss(p, example):
        x, length = example
        given = pack_padded_sequence(x[:, None], length[None])
        output = pad_packed_sequence(functional_call(module, p, (given,))[0])[0][:, 0]
        return ((output.sin().sum(-1) + torch.arange(len(output))) ** 2).sum()

    return loss


@pytest.mark.parametrize("strategy", VECTORISED)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_refused_with_a_way_that_is_the_same(kind, strategy):
    """Catches: PyTorch's 'Batching rule not implemented'; advice that gives other gradients."""
    module = KINDS[kind](D, H, 2)
    params, batch = of(module), (r(B, T, D), LENGTHS)
    for function in (pegrad.per_example_grad, pegrad.per_example_norm):
        if strategy == "auto":
            with pytest.warns(pegrad.FallbackWarning, match="packs sequences"):
                function(packed(module))(params, batch)
            continue
        with pytest.raises(pegrad.StrategyError, match=r"packs sequences.*mask.*strategy='naive'"):
            function(packed(module), strategy=strategy)(params, batch)
    expected = oracle.per_example_grads(packed(module), params, batch)
    oracle.assert_close(pegrad.per_example_grad(masked(module), strategy=strategy)(params, batch), expected)
    oracle.assert_close(pegrad.per_example_grad(packed(module), strategy="naive")(params, batch), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_pitfalls_page_advises_for_sequences_of_different_lengths(strategy):
    """Catches: last states of the padding; a direction that sets out in it."""
    module, part = nn.LSTM(D, H, bidirectional=True), nn.LSTM(D, H)
    params = of(module)

    def as_packed(p, example):
        x, length = example
        given = pack_padded_sequence(x[:, None], length[None])
        return functional_call(module, p, (given,))[1][0].square().sum()

    def as_advised(p, example):
        x, length = example
        at_last = (torch.arange(T) == length - 1)[:, None]
        back = {name.removesuffix("_reverse"): w for name, w in p.items() if name.endswith("_reverse")}
        forth = {name: w for name, w in p.items() if not name.endswith("_reverse")}
        backwards = x[(length - 1 - torch.arange(T)) % T]
        outputs = functional_call(part, forth, (x,))[0], functional_call(part, back, (backwards,))[0]
        return sum((output * at_last).sum(0).square().sum() for output in outputs)

    batch = r(B, T, D), LENGTHS
    expected = oracle.per_example_grads(as_packed, params, batch)
    oracle.assert_close(pegrad.per_example_grad(as_advised, strategy=strategy)(params, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_packed_sequences_in_the_loop(kind):
    """Catches: sequences of one example that end, or set out on the way back, with another one's state."""
    module = KINDS[kind](D, H, 2, bidirectional=True, batch_first=True)

    def loss(p, example):
        x, lengths = example
        given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        results = functional_call(module, p, (given,))
        output, found = pad_packed_sequence(results[0], batch_first=True, padding_value=0.5, total_length=T + 1)
        assert torch.equal(found, lengths)
        return total(output, *flat(results)[1:])

    batch = r(B, 4, T, D), torch.tensor([[4, 1, 2, 2], [1, 1, 1, 1], [2, 3, 1, 2]])
    assert_exact(loss, of(module), batch, "naive")


@pytest.mark.parametrize("strategy", VECTORISED)
def test_what_runs_over_packed_sequences_is_refused_as_well(strategy):
    """Catches: the arguments of another overload, read as if they were those of the usual one."""
    for module in (nn.LSTM(D, H), nn.GRU(D, H), nn.RNN(D, H)):
        params = of(module)

        def loss(p, x, module=module):
            given = torch.nn.utils.rnn.PackedSequence(x, torch.ones(T, dtype=torch.int64))
            return functional_call(module, p, (given,))[0].data.sin().sum()

        function = pegrad.per_example_grad(loss, strategy=strategy)
        if strategy == "auto":
            with pytest.warns(pegrad.FallbackWarning, match="packs sequences"):
                function(params, r(B, T, D))
            continue
        with pytest.raises(pegrad.StrategyError, match="packs sequences"):
            function(params, r(B, T, D))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_of_every_site_agrees_with_the_stacked_gradient(kind):
    """Catches: a report of the wrong rows; bounds that do not bound."""
    module = KINDS[kind](D, H, 2, bidirectional=True)
    params, batch = of(module), r(B, T, 2, D)

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    trace = pegrad.BookKeeping().trace(pegrad.call.Call.of(loss, params, batch, None).problem)
    assert not trace.copies
    expected = dict(zip(map(id, trace.params), oracle.per_example_grads(loss, dict(sorted(params.items())), batch)))  # noqa: B905
    seen = set()

    def receive(tapped, x, g):
        assert (tuple(x.shape), tuple(g.shape)) == (tapped.x, tapped.y)
        for site in tapped.sites:
            rows, shapes = expected[id(site.source)], (tapped.x, tapped.y)
            seen.add(id(site.source))
            for kernel in site.stacking(*shapes).values():
                torch.testing.assert_close(kernel.run(x, g), rows, rtol=1e-10, atol=1e-12)
            for kernel in site.norming(*shapes).values():
                torch.testing.assert_close(kernel.run(x, g).norms, rows.flatten(1).square().sum(1), rtol=1e-10, atol=0)
            if site.bounded:
                magnitudes = Magnitudes(site, x, g)
                amplitude = site.amplitude(*magnitudes.bounds, magnitudes.positions)
                assert (rows.flatten(1).norm(dim=1) <= amplitude).all()
                torch.testing.assert_close(site.summing(*shapes).run(x, g), rows.sum(0), rtol=1e-10, atol=1e-12)

    trace.backward(receive)
    assert seen == set(expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1e3, 1e7, 1e14, 1e19])
def test_steps_that_cancel_do_not_move_the_sum_further_than_its_sensitivity(size, strategy):
    """Catches: reports without bounds on their terms, which rounding could make anything of."""
    steps, width = 6, 3

    def loss(weight, example):
        x, g = example
        weights = [torch.eye(width), weight]
        return (
            torch.rnn_relu(x[None], torch.zeros(1, 1, width), weights, False, 1, 0.0, False, False, True)[0] * g
        ).sum()

    ordinary = torch.rand(40, steps, width), torch.rand(40, steps, width)
    upstream = size * torch.tensor([0.0, 1, -1, 1, -1, 1 / size]).view(-1, 1).expand(steps, width)
    attack = Attack(loss, torch.zeros(width, width), ordinary, (torch.ones(steps, width), upstream))
    assert movement(attack, strategy, at=3) <= 1 + 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(kind):
    """Catches: sites that know their sums, but not their inner products."""
    module = KINDS[kind](D, H, 2, bidirectional=True)
    params, batch = of(module), r(B, T, 2, D)

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    grads = oracle.per_example_grads(loss, dict(sorted(params.items())), batch)
    rows = torch.cat([g.flatten(1) for g in grads], 1)
    along = {name: r(*p.shape) for name, p in params.items()}
    oracle.assert_close(pegrad.gradient_gram(loss)(params, batch), [rows @ rows.T])
    direction = torch.cat([along[name].flatten() for name in sorted(along)])
    oracle.assert_close(pegrad.per_example_dot(loss)(params, batch, along), [rows @ direction])


@pytest.mark.parametrize("strategy", TRACED)
def test_nothing_is_copied_and_explain_says_what_runs(strategy):
    """Catches: a module that falls back to a copy of its weights for each example, which is exact as well."""
    module = nn.LSTM(D, H, 2, bidirectional=True, proj_size=1)
    text = str(pegrad.explain(lambda p, x: total(*flat(functional_call(module, p, (x,)))), of(module), r(B, T, D)))
    assert "copies" not in text
    operations = "lstm input", "lstm input bias", "lstm hidden", "lstm hidden bias", "lstm projection"
    assert all(name in text for name in operations)


@pytest.mark.parametrize(("kind", "made"), [("lstm", 1), ("projected lstm", 1), ("gru", 0)])
def test_the_weights_of_a_layer_share_the_gram_matrix_of_the_gradient_that_both_met(kind, made, monkeypatch):
    """Catches: one made for each of them; and one shared by a GRU's, which meet two gradients."""
    module = KINDS[kind](8, 8)
    params, batch = of(module), r(B, 2, 8)
    product, shared = gram.gram, []
    monkeypatch.setattr(gram, "gram", lambda rows, *columns: (shared.append(rows), product(rows, *columns))[1])

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    norms = pegrad.clipped_grad(loss, clip_norm=1.0, strategy="ghost")(params, batch).norms
    width = module.weight_ih_l0.shape[0]
    assert sum(rows.shape == (B, 2, width) for rows in shared) == made
    grads = oracle.per_example_grads(loss, dict(sorted(params.items())), batch)
    oracle.assert_close([norms], [torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_waits_for_the_garbage_collector(strategy):
    """Catches: a circle from the trace by way of the graph to what the sweeps report to."""
    module = nn.LSTM(D, H, 2, bidirectional=True, proj_size=1)
    params, batch = of(module), r(B, T, D)
    function = pegrad.clipped_grad(
        lambda p, x: total(*flat(functional_call(module, p, (x,)))), clip_norm=1.0, strategy=strategy
    )

    def tensors():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    function(params, batch)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            function(params, batch)
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_inside_the_loss(kind, strategy):
    """Catches: a network that runs at a level of the loss's own, where the trace steps aside."""
    module = KINDS[kind](D, H)

    def energy(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    def penalty(p, x):
        return energy(p, x) + grad(energy, argnums=1)(p, x).square().sum()

    assert_exact(penalty, of(module), r(B, T, D), strategy)
    if strategy != "naive":  # the plain loop cannot run it under vmap either

        def loss(p, xs):
            return vmap(energy, in_dims=(None, 0))(p, xs).square().sum()

        params, batch = of(module), r(B, 2, T, D)
        expected = oracle.per_example_grads(lambda p, xs: sum(energy(p, x).square() for x in xs), params, batch)
        oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)


@pytest.mark.parametrize("strategy", ["vmap", "grouped_conv", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_differentiated_further(kind, strategy):
    """Catches: stacked gradients that are constants where they are to be differentiated."""
    module = KINDS[kind](D, H)
    params, batch = of(module), r(B, T, D)

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    def squares(p):
        return sum(g.square().sum() for g in pegrad.per_example_grad(loss, strategy=strategy)(p, batch).values())

    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    grads = [torch.autograd.grad(loss(leaves, x), [*leaves.values()], create_graph=True) for x in batch]
    whole = sum(g.square().sum() for row in grads for g in row)
    oracle.assert_close(list(grad(squares)(params).values()), list(torch.autograd.grad(whole, [*leaves.values()])))


@pytest.mark.parametrize("strategy", VECTORISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_and_autocast(kind, dtype, strategy):
    """Catches: dtypes that do not go together."""
    module = KINDS[kind](D, H, 2, bidirectional=True)
    params, batch = of(module), r(B, T, D)

    def loss(p, x):
        return sum(y.float().sin().sum() for y in flat(functional_call(module, p, (x,))))

    def exact(p, x):
        return sum(y.sin().sum() for y in flat(functional_call(module, p, (x,))))

    expected = oracle.per_example_grads(exact, params, batch)
    function = pegrad.per_example_grad(loss, strategy=strategy)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    found = function({n: p.to(dtype) for n, p in params.items()}, batch.to(dtype))
    assert all(g.dtype == dtype for g in found.values())
    oracle.assert_close({n: g.double() for n, g in found.items()}, expected, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        found = function({n: p.float() for n, p in params.items()}, batch.float())
    oracle.assert_close({n: g.double() for n, g in found.items()}, expected, 0.15)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [0, 1])
def test_the_modules_own_errors(steps, strategy):
    """Catches: an empty sequence or a wrong width, which PyTorch refuses, let through or explained away."""
    module = nn.LSTM(D, H)
    params = of(module)
    with pytest.raises(RuntimeError, match=r"sequence length|input.size"):
        pegrad.per_example_grad(lambda p, x: functional_call(module, p, (x,))[0].sum(), strategy=strategy)(
            params, r(B, steps, D + steps)
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_of_dp_sgd(strategy):
    """Catches: anything between the rule and the step."""
    module = nn.GRU(D, H, 2)
    params, batch = of(module), r(B, T, D)

    def loss(p, x):
        return total(*flat(functional_call(module, p, (x,))))

    step = pegrad.dp_sgd(
        loss, pegrad.optim.sgd(1.0), clip_norm=1.0, noise_multiplier=0.0, expected_batch_size=1, strategy=strategy
    )
    moved = step(params, step.init(params, pegrad.random.key(0)), batch).params
    expected = oracle.clipped_sum(oracle.per_example_grads(loss, params, batch), 1.0)
    oracle.assert_close({n: params[n] - moved[n] for n in params}, expected)
