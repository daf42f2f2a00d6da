"""Inner products, moments and noise scale against the oracle's stacked gradients."""

import pytest
import torch

import oracle
import pegrad
from cases import CASES
from pegrad import trees


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=CASES)
def problem(request):
    case = CASES[request.param]
    params, batch = case.make()
    grads = oracle.per_example_grads(case.loss, params, batch)
    return case.loss, params, batch, grads


def flat(grads):
    return torch.cat([g.reshape(g.shape[0], -1) for g in grads], 1)


def test_dots(problem):
    """Catches: a site's directional output that forgets groups, padding rows or another use of the leaf."""
    loss, params, batch, grads = problem
    direction = trees.map(torch.randn_like, params)
    dots = pegrad.per_example_dot(loss)(params, batch, direction)
    vector = torch.cat([leaf.flatten() for leaf in trees.leaves(direction)])
    oracle.assert_close(dots, [flat(grads) @ vector])


def test_gram(problem):
    """Catches: cross terms between uses of one leaf left out; a matrix that is right on its diagonal only."""
    loss, params, batch, grads = problem
    oracle.assert_close(pegrad.gradient_gram(loss)(params, batch), [flat(grads) @ flat(grads).T])


def test_moments(problem):
    """Catches: division by B in place of B - 1; a leaf shown before its last use came in."""
    loss, params, batch, grads = problem
    moments = pegrad.gradient_moments(loss)(params, batch)
    oracle.assert_close(moments.mean, [g.mean(0) for g in grads])
    oracle.assert_close(moments.variance, [g.var(0) for g in grads])


def test_noise_scale(problem):
    """Catches: biased estimates; the noise scale of one leaf only."""
    loss, params, batch, grads = problem
    rows = flat(grads)
    covariance = rows.var(0).sum()
    signal = rows.mean(0).square().sum() - covariance / len(rows)
    expected = covariance / signal if signal > 0 else torch.tensor(torch.inf)
    scale = pegrad.gradient_noise_scale(loss)(params, batch)
    torch.testing.assert_close(scale, expected.to(scale.dtype), rtol=1e-6, atol=0)


def test_errors():
    def loss(params, x):
        return (params * x).sum()

    one, none = torch.ones(1, 3), torch.ones(0, 3)
    with pytest.raises(pegrad.ArgumentError, match="at least 2 examples, got 1"):
        pegrad.gradient_noise_scale(loss)(torch.ones(3), one)
    with pytest.raises(pegrad.ArgumentError, match="at least 1 examples, got 0"):
        pegrad.gradient_moments(loss)(torch.ones(3), none)
    with pytest.raises(pegrad.LeafError, match="direction differs from params"):
        pegrad.per_example_dot(loss)(torch.ones(3), one, torch.ones(4))
    assert pegrad.gradient_gram(loss)(torch.ones(3), none).shape == (0, 0)
    assert pegrad.per_example_dot(loss)(torch.ones(3), none, torch.ones(3)).shape == (0,)
