"""What privacy rests on: the weight of every row, and the sensitivity of the sum."""

import math

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pegrad
from cases import CASES
from pegrad.clipping import clip_weights

STRATEGIES = [*pegrad.STRATEGIES]
EXTREMES = [1e30, -1e30, 1e-30, math.nan, math.inf, -math.inf, 0.0, 1e3]


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.floats(1e-6, 1e6))
def test_clip_weights_bound_every_row(squares, clip_norm):
    """Catches: a NaN root, 0 * inf, C / 0, a weight above 1."""
    squared = torch.tensor(squares)
    weights = clip_weights(squared, clip_norm)
    finite = torch.isfinite(squared)
    assert torch.isfinite(weights).all()
    assert (weights[~finite] == 0).all()
    assert (weights <= 1).all()
    norms = squared[finite].clamp(min=0).sqrt()
    assert (weights[finite] * norms <= clip_norm * (1 + 1e-6)).all()
    assert (weights[finite][norms <= clip_norm] == 1).all()


def affine(params, example):
    x, y = example
    hidden = torch.relu(x @ params["w"] + params["b"])
    return (hidden @ params["v"] - y) ** 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("normalize_by", "microbatch_size"),
    [(1.0, None), (7.0, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1.0, 2), (7.0, None)])],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_neighbouring_batches_differ_by_at_most_the_sensitivity(strategy, normalize_by, microbatch_size, data):
    """Catches: a mean before the clip, division by the actual batch size, one bad row that spoils the sum."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    params = {"w": torch.randn(4, 6), "b": torch.randn(6), "v": torch.randn(6)}
    x, y = torch.randn(5, 4), torch.randn(5)
    row = data.draw(st.integers(0, 4))
    value = data.draw(st.one_of(st.sampled_from(EXTREMES), st.floats(-1e6, 1e6, width=32)))
    if data.draw(st.booleans()):
        x[row] = value
    else:
        x[row, 0], y[row] = value, value
    others = torch.arange(5) != row
    function = pegrad.clipped_grad(
        affine, clip_norm=0.7, strategy=strategy, normalize_by=normalize_by, microbatch_size=microbatch_size
    )
    whole = function(params, (x, y))
    removed = function(params, (x[others], y[others]))
    masked = function(params, (x, y), others)
    assert function.sensitivity == pytest.approx(0.7 / normalize_by)
    for neighbour in (removed, masked):
        squares = [(a - b).square().sum() for a, b in zip(whole.grads.values(), neighbour.grads.values(), strict=True)]
        assert torch.stack(squares).sum().sqrt() <= function.sensitivity * (1 + 1e-5)
        assert all(torch.isfinite(g).all() for g in neighbour.grads.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [1e30, math.nan, math.inf])
def test_a_row_without_a_finite_gradient_contributes_zero_and_is_counted(strategy, value):
    """Catches: NaN times zero, in any strategy; a count that takes padding for an example."""
    loss = CASES["convolutions_with_in_place_activation"].loss
    torch.manual_seed(0)
    params, batch = CASES["convolutions_with_in_place_activation"].make()
    params, batch = optree.tree_map(torch.Tensor.float, (params, batch))
    images, targets = batch
    images = images.clone()
    images[1], images[3] = value, value
    mask = torch.tensor([True, True, True, False, True])
    function = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)
    out = function(params, (images, targets), mask)
    clean = function(params, batch, torch.tensor([True, False, True, False, True]))
    assert out.non_finite == 1
    for a, b in zip(optree.tree_leaves(out.grads), optree.tree_leaves(clean.grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_zero_gradient_has_norm_zero_and_stays_finite(strategy):
    """Catches: division by a norm of zero."""
    out = pegrad.clipped_grad(affine, clip_norm=1.0, strategy=strategy)(
        {"w": torch.zeros(4, 6), "b": torch.zeros(6), "v": torch.zeros(6)}, (torch.zeros(3, 4), torch.zeros(3))
    )
    assert (out.norms == 0).all()
    assert all((g == 0).all() for g in out.grads.values())
    assert out.non_finite == 0
