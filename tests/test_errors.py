"""Bad input gets a typed error that names the leaf, what was expected and what to do; never the data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import pegrad

STRATEGIES = [*pegrad.STRATEGIES]
PARAMS = {"w": torch.ones(3)}
BATCH = torch.ones(2, 3)


def good(params, x):
    return (params["w"] * x).sum()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params has no leaves"),
        ({"net": [torch.ones(2), torch.ones(2, dtype=torch.int64)]}, r"params\['net'\]\[1\] has dtype torch.int64"),
        ({"w": 3.0}, r"params\['w'\] is of type float: expected a torch.Tensor"),
    ],
)
def test_parameters(params, message):
    with pytest.raises(pegrad.LeafError, match=message):
        pegrad.per_example_grad(good)(params, BATCH)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "batch has no leaves"),
        ((torch.ones(2, 3), torch.ones(4)), r"batch\[1\] has 4 examples but batch\[0\] has 2"),
        ({"x": torch.ones(2), "n": torch.tensor(1.0)}, r"batch\['n'\] is a scalar"),
        ([torch.ones(2), "label"], r"batch\[1\] is of type str"),
    ],
)
def test_batch(batch, message):
    with pytest.raises(pegrad.LeafError, match=message):
        pegrad.per_example_grad(good)(PARAMS, batch)


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(3, dtype=torch.bool)])
def test_mask(mask):
    with pytest.raises(pegrad.LeafError, match=r"mask has dtype .* expected torch.bool and \(2,\)"):
        pegrad.per_example_grad(good)(PARAMS, BATCH, mask)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p, x: p["w"] * x, pegrad.LossError, r"shape \(3,\).*reduce over all axes"),
        (lambda p, x: 1.0, pegrad.LossError, "type float"),
        (lambda p, x: (p["w"] * x).sum().long(), pegrad.LossError, "dtype torch.int64"),
        (lambda p, x: (good(p, x), {"name": "x"}), pegrad.LeafError, r"aux\['name'\] is of type str"),
        (
            lambda p, x: F.batch_norm(x[None, :, None], None, None, p["w"], training=True).sum(),
            pegrad.LossError,
            "batch normalisation in training mode",
        ),
    ],
)
def test_loss(strategy, loss, error, message):
    with pytest.raises(error, match=message):
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(PARAMS, BATCH)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_norm_module_is_refused_in_training_and_served_in_evaluation(strategy):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()

    def loss(params, x):
        return functional_call(module, params, (x[None],)).square().sum()

    params, batch = dict(module.named_parameters()), torch.randn(2, 3, dtype=torch.float64)
    function = pegrad.per_example_grad(loss, strategy=strategy)
    with pytest.raises(pegrad.LossError, match=r"module.eval\(\)"):
        function(params, batch)
    module.eval()
    assert all(g.shape == (2, *p.shape) for g, p in zip(function(params, batch).values(), params.values(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pegrad.per_example_grad(good, strategy="fast"),
            "Expected strategy to be one of .*'auto'.* got 'fast'",
        ),
        (lambda: pegrad.per_example_grad(good, microbatch_size=0), "microbatch_size=0"),
        (lambda: pegrad.per_example_norm(good, microbatch_size=-1), "microbatch_size=-1"),
        (lambda: pegrad.clipped_grad(good, clip_norm=0.0), "clip_norm=0.0"),
        (lambda: pegrad.clipped_grad(good, clip_norm=float("nan")), "clip_norm=nan"),
        (lambda: pegrad.clipped_grad(good, clip_norm=1.0, normalize_by=-2), "normalize_by=-2"),
        (lambda: pegrad.clipped_grad(good, clip_norm=1.0, microbatch_size=0), "microbatch_size=0"),
        (lambda: _dp_sgd(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
        (lambda: _dp_sgd(expected_batch_size=0), "expected_batch_size=0"),
        (lambda: _dp_sgd(optimizer=torch.optim.SGD([torch.ones(1)], 0.1)), "init and update, got SGD"),
        (lambda: _dp_sgd().init(PARAMS, torch.zeros(2)), "key"),
        (lambda: pegrad.add_noise(pegrad.random.key(0), PARAMS, float("inf"), step=0), "std=inf"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(pegrad.ArgumentError, match=message):
        make()


def test_every_error_is_a_pegrad_error_and_a_builtin_one():
    for error, builtin in [
        (pegrad.ArgumentError, ValueError),
        (pegrad.LeafError, TypeError),
        (pegrad.LossError, TypeError),
        (pegrad.MissingExtraError, ImportError),
        (pegrad.DataFileError, ValueError),
        (pegrad.BatchOverflowError, RuntimeError),
    ]:
        assert issubclass(error, pegrad.PegradError)
        assert issubclass(error, builtin)


def _dp_sgd(**changes):
    arguments = {"optimizer": pegrad.optim.sgd(0.1), "clip_norm": 1.0, "noise_multiplier": 1.0}
    return pegrad.dp_sgd(good, **(arguments | {"expected_batch_size": 2} | changes))
