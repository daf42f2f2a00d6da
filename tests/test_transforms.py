"""Per-example functions under further transforms of torch.func, and under plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

import pegrad

DIFFERENTIABLE = ["naive", "vmap", "grouped_conv"]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    w, v = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.randn(4, 2, 2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def loss(params, x):
        y = F.conv2d(x, params[0], padding=1, groups=2).sin()
        return F.conv_transpose2d(y, params[1], stride=2).square().mean()

    return loss, [w, v], x


@pytest.mark.parametrize("strategy", DIFFERENTIABLE)
def test_gradient_of_a_function_of_gradients(strategy, problem):
    """Catches: a rule whose backward is not itself differentiable, or is wrong."""
    loss, params, x = problem

    def penalty(params, strategy):
        return sum(g.sin().sum() for g in pegrad.per_example_grad(loss, strategy=strategy)(params, x))

    for got, want in zip(grad(penalty)(params, strategy), grad(penalty)(params, "vmap"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", DIFFERENTIABLE)
def test_plain_autograd_through_the_clipped_sum(strategy, problem):
    """Catches: a graph cut inside a strategy."""
    loss, params, x = problem
    params = [p.clone().requires_grad_() for p in params]
    out = pegrad.clipped_grad(loss, clip_norm=0.1, strategy=strategy)(params, x)
    got = torch.autograd.grad(sum(g.sin().sum() for g in out.grads), params)
    out = pegrad.clipped_grad(loss, clip_norm=0.1, strategy="vmap")(params, x)
    want = torch.autograd.grad(sum(g.sin().sum() for g in out.grads), params)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", DIFFERENTIABLE)
def test_vmap_over_models(strategy, problem):
    """Catches: a rule that takes its weight for shared when it has an axis of its own."""
    loss, params, x = problem
    models = [torch.stack([p, 2 * p, p - 1]) for p in params]
    function = pegrad.per_example_grad(loss, strategy=strategy)
    together = vmap(function, in_dims=(0, None))(models, x)
    for m in range(3):
        alone = function([p[m] for p in models], x)
        torch.testing.assert_close([g[m] for g in together], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # in torch's own tangents
@pytest.mark.parametrize("strategy", DIFFERENTIABLE)
def test_forward_mode_over_reverse_mode(strategy, problem):
    """Catches: a missing or wrong tangent rule."""
    loss, params, x = problem
    tangents = [torch.randn_like(p) for p in params]
    function = pegrad.per_example_grad(loss, strategy=strategy)
    step = 1e-6
    plus, minus = (function([p + s * t for p, t in zip(params, tangents, strict=True)], x) for s in (step, -step))
    _, got = jvp(lambda p: function(p, x), (params,), (tangents,))
    for tangent, a, b in zip(got, plus, minus, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)
