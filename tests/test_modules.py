"""Modules as pure functions of one example, and back; batch normalisation taken out."""

from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import pegrad
from pegrad import trees
from pegrad.modules import replace_batch_norm

STRATEGIES = [*pegrad.STRATEGIES]
B = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def of_the_module_itself(module, loss, batch):
    """Per-example gradients by calling the module on batches of one, its own parameters differentiated."""
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = []
    for b in range(B):
        one = [leaf[b : b + 1] for leaf in batch]
        rows.append(torch.autograd.grad(loss(module, *one), list(own.values())))
    grads = dict(zip(own, (torch.stack(column) for column in zip(*rows, strict=True)), strict=True))
    return trees.leaves(grads)


def assert_exact(module, loss, of_example, batch, strategy="auto", batch_axis=0):
    """Compare with the module itself: `loss(module, *rows)` there, `of_example(apply, params, *example)` here."""
    expected = of_the_module_itself(module, loss, batch)
    assert oracle.norms(expected).min() > 0
    apply, params = pegrad.from_module(module, batch_axis=batch_axis)
    clip_norm = oracle.norms(expected).median().item()
    clipped = pegrad.clipped_grad(
        lambda params, example: of_example(apply, params, *example), clip_norm=clip_norm, strategy=strategy
    )
    oracle.assert_close(clipped(params, batch).grads, oracle.clipped_sum(expected, clip_norm))


def classifier():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def images():
    return r(B, 2, 6, 6), torch.arange(B) % 3


def whole_loss(module, x, y):
    return F.cross_entropy(module(x), y)


def example_loss(apply, params, x, y):
    return F.cross_entropy(apply(params, x), y)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sequential_classifier(strategy):
    """Catches: a batch axis left on or taken off twice; parameters that do not reach the module."""
    assert_exact(classifier(), whole_loss, example_loss, images(), strategy)


class Features(NamedTuple):
    first: Tensor
    rest: dict


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs, *, scale, flag, shared=None):
        assert flag == "yes"
        assert shared is None
        (x, y), more = inputs["pair"], inputs["more"]
        assert x.shape == (1, 5, 3)
        assert y.shape == scale.shape == (1,)
        assert more[0].shape == (1, 3)
        z = self.linear(x) * scale
        loss = (z.mean((1, 2)) - y).square().mean()  # over the batch, as modules do
        return Features(z, UserDict(loss=loss, list=[more[0], None, 7], tokens=z.flatten(0, 1)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nested_arguments_and_outputs(strategy):
    """Catches: a batch axis missed in dicts, tuples, other mappings or keyword arguments."""
    module = Nested().double()
    batch = {"x": r(B, 5, 3), "y": r(B), "scale": r(B), "more": r(B, 3)}
    apply, params = pegrad.from_module(module)

    def run(params, example):
        inputs = {"pair": (example["x"], example["y"]), "more": [example["more"]]}
        return apply(params, inputs, scale=example["scale"], flag="yes")

    def loss(params, example):
        out = run(params, example)
        assert isinstance(out, Features)
        assert type(out.rest) is UserDict
        assert out.first.shape == (5, 2)
        assert out.rest["list"][0].shape == (3,)
        assert out.rest["list"][1:] == [None, 7]
        assert out.rest["tokens"].shape == (5, 2)  # its axis is none of the batch's
        assert out.rest["loss"].shape == ()
        return out.rest["loss"]

    expected = oracle.per_example_grads(loss, params, batch)
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)


def test_a_batch_axis_that_is_not_the_first():
    """Catches: the first axis taken for the batch's, whatever the module says."""
    lstm = nn.LSTM(3, 2, num_layers=2).double()
    x = r(5, 3)
    apply, params = pegrad.from_module(lstm, batch_axis=1)
    out, (h, c) = apply(params, x)
    expected, (hidden, cell) = lstm(x[:, None])
    assert torch.equal(out, expected[:, 0])
    assert torch.equal(h, hidden[:, 0])
    assert torch.equal(c, cell[:, 0])
    batch = r(B, 5, 3)
    for axis in (1, None):
        apply, params = pegrad.from_module(lstm, batch_axis=axis)
        assert torch.equal(apply(params, x)[0], out)

        def loss(params, x, apply=apply):
            return apply(params, x)[0].sin().sum()

        expected = oracle.per_example_grads(
            lambda p, x: torch.func.functional_call(lstm, p, x)[0].sin().sum(), params, batch
        )
        oracle.assert_close(pegrad.per_example_grad(loss)(params, batch), expected)
    with pytest.raises(pegrad.LeafError, match="batch_axis=3"):
        pegrad.from_module(lstm, batch_axis=3)[0](params, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tied_weight_is_one_leaf(strategy):
    """Catches: a tied weight given twice, or a use of it that keeps the module's own."""
    module = Tied().double()
    assert "head.weight" not in pegrad.from_module(module).params
    tokens = torch.randint(0, 7, (B, 5))
    assert_exact(
        module,
        lambda module, tokens: F.cross_entropy(module(tokens)[0], tokens[0]),
        lambda apply, params, tokens: F.cross_entropy(apply(params, tokens), tokens),
        (tokens,),
        strategy,
    )
    trained = {name: p + 1 for name, p in pegrad.from_module(module).params.items()}
    copy = pegrad.to_module(module, trained, copy=True)
    assert copy.head.weight is copy.embed.weight


class LowRank(nn.Module):
    """A frozen linear map and a trained change of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_requires_a_gradient_is_trained(strategy):
    """Catches: frozen weights among the parameters, which would get noise; or not the module's own in the forward."""
    module = nn.Sequential(nn.Linear(4, 6), LowRank(nn.Linear(6, 3))).double()
    module[0].weight.requires_grad_(False)
    apply, params = pegrad.from_module(module)
    assert set(params) == {"0.bias", "1.down.weight", "1.up.weight"}
    assert_exact(module, whole_loss, example_loss, (r(B, 4), torch.arange(B) % 3), strategy)
    before = {name: p.clone() for name, p in module.named_parameters()}
    pegrad.to_module(module, {name: p + 1 for name, p in params.items()})
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name] + (1 if name in params else 0))
    assert apply.module is module


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_batch_normalisation_is_served(strategy):
    """Catches: statistics other than the module's; a module in evaluation refused."""
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3)).double()
    module(r(9, 2, 5))  # gives it statistics
    module.eval()
    assert_exact(module, whole_loss, example_loss, (r(B, 2, 5), torch.arange(B) % 3), strategy)


def test_the_modules_mode_holds_from_the_next_call_on():
    """Catches: a mode remembered from when the function was made."""
    module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5))
    apply, params = pegrad.from_module(module)
    x = torch.ones(3)
    assert not torch.equal(apply(params, x), apply(params, x))
    module.eval()
    assert torch.equal(apply(params, x), apply(params, x))


def test_dropout_draws_from_the_steps_key():
    """Catches: dropout that differs when a step is repeated, or that is the same for all examples or steps."""
    module = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Linear(20, 3))
    apply, params = pegrad.from_module(module)

    def loss(params, example):
        out = apply(params, example)
        return out.square().sum(), out

    step = pegrad.dp_sgd(loss, pegrad.optim.sgd(0.1), clip_norm=1.0, noise_multiplier=0.0, expected_batch_size=B)
    state = step.init(params, pegrad.random.key(0))
    batch = torch.ones(B, 3)
    first, again = step(params, state, batch), step(params, state, batch)
    torch.testing.assert_close(first.params, again.params, rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in first.metrics.aux}) == B
    later = step(params, first.state, batch)
    assert not torch.equal(first.metrics.aux, later.metrics.aux)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
        nn.InstanceNorm1d(4, track_running_stats=True, affine=True),
    ],
    ids=["batch", "sync", "batch without statistics", "instance with statistics"],
)
def test_normalisation_over_the_batch_is_refused(norm):
    """Catches: one that couples examples, or keeps what it saw of them."""
    module = nn.Sequential(nn.Linear(5, 5), norm)
    with pytest.raises(pegrad.LossError, match=r"module\.1 is a \w+.*replace_batch_norm"):
        pegrad.from_module(module)
    with pytest.raises(pegrad.LossError, match="The module is a"):
        pegrad.from_module(norm)
    pegrad.from_module(replace_batch_norm(module))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_normalisation_that_starts_to_train_later_is_refused(strategy):
    """Catches: a check that is made once."""
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)).eval()
    apply, params = pegrad.from_module(module)
    module.train()
    with pytest.raises(pegrad.LossError, match="batch normalisation in training mode"):
        pegrad.per_example_grad(lambda params, x: apply(params, x).sum(), strategy=strategy)(
            params, torch.ones(B, 2, 4)
        )


class Counting(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.how = how

    def forward(self, x):
        if self.how == "in place":
            self.seen += 1
        elif self.how == "by the data":
            self.seen += x.detach().sum()
        elif self.how == "assigned":
            self.seen = self.seen + x.detach().sum()
        else:
            self.register_buffer("other", torch.ones(1))
        return self.linear(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["in place", "by the data", "assigned", "new"])
def test_a_module_that_changes_its_buffers_is_refused(strategy, how):
    """Catches: a module that remembers; a tensor of a transform left behind in it."""
    module = Counting(how)
    apply, params = pegrad.from_module(module)
    with pytest.raises(pegrad.LossError, match=r"buffer|pure function"):
        pegrad.per_example_grad(lambda params, x: apply(params, x).sum(), strategy=strategy)(params, torch.ones(B, 3))
    if how == "assigned":
        assert torch.equal(module.seen, torch.zeros(1))
    apply, params = pegrad.from_module(Counting(how))
    with pytest.raises(pegrad.LossError, match="changes its buffer"):
        apply(params, torch.ones(3))


def test_parameters_go_back_into_the_module_or_a_copy():
    """Catches: parameters that are not written, or written into the wrong module; memory that both share."""
    module = classifier()
    before = {name: p.clone() for name, p in module.named_parameters()}
    apply, params = pegrad.from_module(module)
    trained = {name: p + 1 for name, p in params.items()}
    copy = pegrad.to_module(module, trained, copy=True)
    x = r(2, 6, 6)
    assert torch.equal(copy(x[None])[0], apply(trained, x))
    torch.testing.assert_close(dict(module.named_parameters()), before, rtol=0, atol=0)
    assert pegrad.to_module(module, trained) is module
    assert torch.equal(module(x[None])[0], apply(trained, x))
    torch.testing.assert_close(params, {n: p.detach() for n, p in before.items()}, rtol=0, atol=0)


def test_errors_name_what_is_wrong():
    """Catches: parameters that do not match, of which a module would silently use its own instead."""
    module = nn.Sequential(nn.Linear(3, 2))
    apply, params = pegrad.from_module(module)
    x = torch.ones(3)
    wrong = [
        ({"0.weight": params["0.weight"]}, "lacks '0.bias'"),
        ({**params, "1.bias": torch.ones(2)}, r"has '1\.bias'"),
        ({**params, "0.bias": torch.ones(3)}, r"params\['0\.bias'\] is \(3,\).*\(2,\)"),
        ({**params, "0.bias": None}, r"params\['0\.bias'\] is NoneType"),
        (list(params.values()), "of type list"),
    ]
    for given, message in wrong:
        with pytest.raises(pegrad.LeafError, match=message):
            apply(given, x)
        with pytest.raises(pegrad.LeafError, match=message):
            pegrad.to_module(module, given)
    with pytest.raises(pegrad.ArgumentError, match="No parameter of this Sequential"):
        pegrad.from_module(nn.Sequential(nn.ReLU()))
    with pytest.raises(pegrad.ArgumentError, match="No parameter"):
        pegrad.from_module(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(pegrad.ArgumentError, match="no shape yet"):
        pegrad.from_module(nn.LazyLinear(2))
    with pytest.raises(pegrad.ArgumentError, match="batch_axis"):
        pegrad.from_module(module, batch_axis=-1)


def test_check_compares_in_float64():
    """Catches: frozen parameters and buffers that stay in float32, so that only rough comparisons are possible."""
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6), LowRank(nn.Linear(6, 3))).eval()
    module[2].running_mean = module[1].running_mean  # one buffer of two
    apply, params = pegrad.from_module(module)
    report = pegrad.check(lambda p, ex: example_loss(apply, p, *ex), params, (torch.randn(B, 4), torch.arange(B) % 3))
    assert report.dtypes == ("float64", "float32")
    assert not report.notes
    half = {name: p.bfloat16() for name, p in params.items()}
    assert apply(half, torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.BatchNorm2d(6, eps=0.01)
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), shared, nn.Conv2d(6, 6, 3, bias=False), nn.Sequential(shared))
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 3)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.last(self.head(self.plain(self.body(x).tanh()).square().mean((2, 3))))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_group_normalisation_in_the_place_of_batch_normalisation(strategy):
    """Catches: a normalisation left, scale or shift lost, a shared one split, the original changed."""
    module = Convolutions().double()
    nn.init.normal_(module.body[1].weight)
    nn.init.normal_(module.body[1].bias)
    module.body[1].bias.requires_grad_(False)
    new = replace_batch_norm(module)
    assert not any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in new.modules())
    assert isinstance(module.body[1], nn.BatchNorm2d)
    norm = new.body[1]
    assert new.body[3][0] is norm
    assert (norm.num_groups, norm.num_channels, norm.eps) == (3, 6, 0.01)
    assert torch.equal(norm.weight, module.body[1].weight)
    assert torch.equal(norm.bias, module.body[1].bias)
    assert not norm.bias.requires_grad
    assert norm.weight is not module.body[1].weight
    assert new.plain.weight is None
    assert_exact(new, whole_loss, example_loss, (r(B, 2, 8, 8), torch.arange(B) % 3), strategy)


def test_how_many_groups():
    """Catches: groups that do not divide the channels, or of one channel, whose mean is all that a channel tells."""
    for channels, groups, expected in [(64, 32, 32), (32, 32, 16), (48, 32, 24), (7, 32, 1), (1, 32, 1), (64, 4, 4)]:
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            assert replace_batch_norm(kind(channels), groups=groups).num_groups == expected
    assert not replace_batch_norm(nn.BatchNorm2d(4).eval()).training


def test_instance_normalisation_computes_what_it_did_in_training():
    """Catches: statistics over more than a channel of one example."""
    x = r(B, 3, 5, 4)
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double()
    nn.init.normal_(norm.weight)
    new = replace_batch_norm(nn.Sequential(norm))
    torch.testing.assert_close(new(x), norm(x))
    plain = nn.Sequential(nn.InstanceNorm2d(3))
    assert isinstance(replace_batch_norm(plain)[0], nn.InstanceNorm2d)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_what_cannot_be_replaced_is_named():
    """Catches: an activation lost with the normalisation that it was a part of."""
    with pytest.raises(pegrad.ArgumentError, match="0 is a Activated"):
        replace_batch_norm(nn.Sequential(Activated(4)))
    with pytest.raises(pegrad.ArgumentError, match="no shape yet"):
        replace_batch_norm(nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(pegrad.ArgumentError, match="groups=0"):
        replace_batch_norm(nn.BatchNorm2d(4), groups=0)


class Fixed(UserDict):
    """A mapping that a dict alone does not make."""

    def __init__(self, items, *, by_name):
        super().__init__(items)


class Attributes(OrderedDict):
    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("make", "seen"),
    [(UserDict, UserDict), (Attributes, Attributes), (lambda items: Fixed(items, by_name=1), dict)],
    ids=["UserDict", "subclass of OrderedDict", "a constructor of its own"],
)
def test_any_mapping_is_a_batch(strategy, make, seen):
    """Catches: a mapping taken for a leaf, in the batch, within it, or in aux; its type lost on the way to the loss."""
    params = {"w": r(3)}
    batch = make({"y": r(B), "x": make({"x": r(B, 3)})})

    def loss(params, example):
        assert type(example) is seen
        assert type(example["x"]) is seen
        value = (example["x"]["x"] @ params["w"] - example["y"]) ** 2
        return value, make({"value": value})

    expected = oracle.per_example_grads(
        lambda params, example: (example[0] @ params["w"] - example[1]) ** 2, params, (batch["x"]["x"], batch["y"])
    )
    out = pegrad.per_example_value_and_grad(loss, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, expected)
    assert type(out.aux) is seen
    assert torch.equal(out.aux["value"], out.losses)


def test_mappings_meet_the_rest_of_the_library():
    """Catches: a part that flattens in a way of its own; an error that does not name the leaf."""
    batch = UserDict({"x": r(B, 3), "y": r(B)})
    params = UserDict({"w": r(3)})

    def loss(params, example):
        return (example["x"] @ params["w"] - example["y"]) ** 2

    pegrad.check(loss, params, batch)
    assert "params['w']" in str(pegrad.explain(loss, params, batch))
    sampler = pegrad.sampling.PoissonSampler(num_examples=B, sampling_rate=0.5)
    draw = sampler(pegrad.random.key(0), 0)
    step = pegrad.dp_sgd(loss, pegrad.optim.adam(0.1), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=2)
    state = step.init(params, pegrad.random.key(1))
    new, _, _ = step(params, state, pegrad.sampling.gather(batch, draw), draw.mask)
    assert type(new) is UserDict
    assert new["w"].shape == (3,)
    with pytest.raises(pegrad.LeafError, match=r"batch\['y'\] has 3 examples"):
        pegrad.per_example_grad(loss)(params, UserDict({"x": r(B, 3), "y": r(3)}))
    with pytest.raises(pegrad.LeafError, match=r"batch\['y'\] is of type tuple|batch\['y'\]\[0\] is of type int"):
        pegrad.per_example_grad(loss)(params, UserDict({"x": r(B, 3), "y": (1, 2)}))
