"""Transforms inside the loss: of `torch.func`, and `torch.autograd.grad`; under a `vmap`, images of an example."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import oracle
import pegrad
from cases import r

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # in torch's own tangents
]

B, A, D = 3, 4, 6
Case = tuple[Callable[[Any, Any], Tensor], Callable[[], Any], Callable[[], Any]]
IMAGES: dict[str, Case] = {}
OTHERS: dict[str, Case] = {}


def case(table: dict[str, Case], params: Callable[[], Any], batch: Callable[[], Any]) -> Callable[[Callable], Callable]:
    def register(loss: Callable) -> Callable:
        table[loss.__name__] = loss, params, batch
        return loss

    return register


@case(IMAGES, lambda: {"w": r(D, D), "b": r(D), "v": r(D, D), "u": r(D)}, lambda: (r(B, 5, A, D), r(B, D)))
def linear_maps(p, example):
    """Catches: an axis taken for another; a tensor that is the same for all images."""
    images, x = example

    def one(t):
        h = F.linear(t, p["w"], p["b"]).tanh() @ p["v"] + F.linear(x, p["w"])
        return (h @ p["u"]).sin().sum() + (p["v"] @ t.T).cos().sum() + p["v"].mv(t[0]).sum() * (t[1] @ p["u"])

    return vmap(one, in_dims=1)(images).exp().mean()


@case(IMAGES, lambda: {"w": r(2, D, 3), "v": r(D, 3), "m": r(D, D)}, lambda: r(B, A, 5, D))
def contractions(p, images):
    """Catches: an index of a contraction that means something else already; a product from either side."""

    def one(t):
        y = torch.einsum("zd,hde->hze", t, p["w"]).sin() @ p["v"].T
        return y.cos().sum() + torch.mm(t, p["m"]).sum(1).mul(t.matmul(p["v"]).sum(1)).sin().sum()

    return vmap(one)(images).sum()


@case(IMAGES, lambda: {"k": r(4, 2, 3, 3), "b": r(4), "t": r(4, 2, 2, 2), "w": r(8, 4)}, lambda: r(B, A, 2, 6, 6))
def convolutions(p, images):
    """Catches: images of several examples mixed; an image with and without an axis in front."""

    def one(t):
        y = F.conv2d(t[None], p["k"], p["b"], padding="same").relu() + F.conv2d(t, p["k"], padding=1).sin()
        y = F.conv_transpose2d(y, p["t"], stride=2)
        return (F.conv2d(torch.stack([y[0], 2 * y[0]]), p["k"], stride=2).mean((2, 3)).flatten() @ p["w"]).sin().sum()

    return vmap(one)(images).logsumexp(0)


@case(IMAGES, lambda: {"s": r(D), "t": r(D), "w": r(D, D)}, lambda: r(B, A, 2, D, 5))
def normalisations(p, images):
    def one(t):
        y = F.group_norm(t, 2, p["s"], p["t"]).sin() + F.instance_norm(t, weight=p["s"])
        y = F.layer_norm(y.mT, (D,), p["s"], p["t"]) @ p["w"]
        return F.rms_norm(y, (D,), p["s"]).cos().sum()

    return vmap(one)(images).sum()


@case(IMAGES, lambda: {"table": r(7, D), "w": r(D, D)}, lambda: torch.randint(7, (B, A, 5)))
def tokens(p, sentences):
    one = vmap(lambda t: (F.embedding(t, p["table"], padding_idx=0) @ p["w"]).sin().sum())
    return one(sentences).square().sum() + vmap(vmap(lambda t: F.embedding(t, p["table"]).cos().sum()))(sentences).sum()


@case(IMAGES, lambda: {"w": r(D, D)}, lambda: r(B, A, 2, 3, D))
def a_vmap_in_a_vmap(p, images):
    """Catches: axes in the wrong order; a level of the stack lost."""
    inner = vmap(lambda t: F.linear(t, p["w"]).sin().sum(0), in_dims=1, out_dims=1)
    return vmap(lambda t: inner(t).exp().mT @ p["w"])(images).cos().sum()


LAYER = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True).double()


@case(IMAGES, lambda: {name: r(*p.shape) for name, p in LAYER.named_parameters()}, lambda: r(B, A, 5, D))
def a_transformer(p, images):
    """Catches: PyTorch's own functions not seen through; attention that mixes images."""
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return vmap(lambda t: functional_call(LAYER, p, (t[None],), {"src_mask": mask}).sin().sum())(images).sum()


@case(IMAGES, lambda: {"w": r(3 * D, D)}, lambda: (r(B, A, 5, D), r(B, A, 5, 5)))
def attention_with_a_mask_for_each_image(p, example):
    def one(t, mask):
        q, k, v = F.linear(t, p["w"]).unflatten(-1, (3, 2, 3)).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sin().sum()

    return vmap(one)(*example).sum()


@case(IMAGES, lambda: {"w": r(D, D)}, lambda: r(B, A, 5, D))
def what_runs_again(p, images):
    """Catches: a function that runs again without the loss's own `vmap`."""
    return vmap(lambda t: pegrad.checkpoint(lambda h: (h @ p["w"]).sin().exp(), t * 2).sum())(images).cos().sum()


@case(OTHERS, lambda: {"w": r(D, D), "s": r(D)}, lambda: r(B, A, D))
def images_that_meet_an_operation_without_a_rule(p, images):
    return vmap(lambda t: (F.linear(t, p["w"]).tanh() * p["s"] + p["s"].exp()).sum().sin())(images).sum()


@case(OTHERS, lambda: {"w": r(D, D)}, lambda: r(B, D))
def a_vmap_over_weights(p, x):
    return vmap(lambda w: F.linear(x, w[None]).sin().sum())(p["w"]).sum() + F.linear(x, p["w"]).cos().sum()


@case(OTHERS, lambda: {"w": r(D, D)}, lambda: r(B, D))
def a_vmap_over_what_the_examples_share(p, x):
    return vmap(lambda t: F.linear(t, p["w"]).sin())(torch.eye(D, dtype=x.dtype)).sum(0) @ F.linear(x, p["w"]).sin()


@case(OTHERS, lambda: {"w": r(D, D), "v": r(2, D, D)}, lambda: (r(B, A, D), r(B, A, 2, D, D)))
def products_of_two_that_are_batched(p, example):
    x, m = example
    y = vmap(lambda t, m: torch.einsum("d,hde->e", t, m) @ p["w"])(x, m)
    return y.sin().sum() + vmap(lambda m: (m @ p["v"]).sin().sum())(m).sum()


def net(p, x):
    return (F.linear(F.linear(x, p["w"]).tanh(), p["v"]).sin() * p["s"]).sum()


def params():
    return {"w": r(4, D), "v": r(D, 4), "s": r(D)}


@case(OTHERS, params, lambda: r(B, D))
def a_gradient_penalty(p, x):
    return grad(lambda t: net(p, t))(x).square().sum() + net(p, x)


@case(OTHERS, params, lambda: r(B, D))
def a_penalty_of_the_gradient_by_parameters(p, x):
    return sum(g.square().sum() for g in grad(net)(p, x).values())


@case(OTHERS, params, lambda: r(B, A, D))
def gradients_at_many_points(p, points):
    return vmap(grad(lambda t: net(p, t)))(points).square().sum() + vmap(lambda t: net(p, t))(points).mean()


@case(OTHERS, params, lambda: r(B, D))
def directional_derivatives(p, x):
    forward = jvp(lambda t: net(p, t), (x,), (x.sin(),))[1]
    by_weights = jvp(lambda w: net({**p, "w": w}, x), (p["w"],), (p["w"].cos(),))[1]
    value, pull = vjp(lambda t: F.linear(t, p["w"]).tanh(), x)
    return forward.square() + by_weights + pull(value.cos())[0].square().sum()


@case(OTHERS, params, lambda: r(B, D))
def jacobians(p, x):
    def layer(t):
        return F.linear(t, p["w"]).tanh() * p["s"][:4]

    return jacrev(layer)(x).square().sum() + jacfwd(layer)(x).exp().sum() + hessian(lambda t: net(p, t))(x).cos().sum()


@case(OTHERS, params, lambda: r(B, D))
def autograd_by_the_input(p, x):
    """Catches: a second use of the weights, in the gradient, of which taps know nothing."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(p, x), x, create_graph=True)
    return g.square().sum() + net(p, x)


@case(IMAGES, lambda: {"w": r(D, D)}, lambda: r(B, D))
def a_gradient_asked_for_that_is_there(p, x):
    """Catches: what transforms refuse though it changes nothing; Hugging Face's checkpointing asks for it."""
    return F.linear(x, p["w"]).requires_grad_(True).sin().sum()


@case(OTHERS, params, lambda: r(B, D))
def autograd_by_what_was_computed(p, x):
    h = F.linear(x, p["w"]).tanh()
    y = F.linear(h, p["v"])
    one, two = torch.autograd.grad((y, h.sin()), [h, y], (y.cos(), torch.ones(4, dtype=x.dtype)), create_graph=True)
    return (one.square().sum() + two.sin().sum()) * p["s"].sum()


@case(OTHERS, params, lambda: r(B, D))
def autograd_by_parameters(p, x):
    grads = torch.autograd.grad(net(p, x), list(p.values()), create_graph=True)
    return sum(g.square().sum() for g in grads)


@case(OTHERS, params, lambda: r(B, D))
def autograd_whose_result_is_a_constant(p, x):
    h = F.linear(x, p["w"])
    (g,) = torch.autograd.grad(net(p, x + 0 * h.sum()), h, retain_graph=True, allow_unused=True)
    (k,) = torch.autograd.grad(h.sin().sum(), h)
    return (k * h).sum() + 0 * g.sum() + net(p, x)


@case(OTHERS, params, lambda: r(B, D))
def autograd_through_what_runs_again(p, x):
    x = x * 2
    x.requires_grad = True
    y = pegrad.checkpoint(lambda t: F.linear(t, p["w"]).sin().exp(), x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (F.linear(g, p["w"]).cos() @ p["v"].T).sum() * p["s"].sum() + y.sum()


@case(OTHERS, params, lambda: r(B, D))
def autograd_inside_what_runs_again(p, x):
    """Catches: a function that runs again while it runs for the first time."""

    def block(t):
        t = t * 1
        (g,) = torch.autograd.grad(net(p, t), t, create_graph=True)
        return g.sin().exp()

    return pegrad.checkpoint(block, F.linear(x, p["w"]) @ p["w"]).sum()


@case(OTHERS, params, lambda: r(B, D))
def functional_products(p, x):
    """Catches: `zeros_like(..., requires_grad=True)`, of which a transform makes what does not require a gradient."""
    options = {"create_graph": True}
    product = torch.autograd.functional.hvp(lambda t: net(p, t), x, x.cos(), **options)[1]
    jacobian = torch.autograd.functional.jacobian(lambda t: F.linear(t, p["w"]).tanh(), x, **options)
    return product.square().sum() + jacobian.square().sum()


@case(OTHERS, params, lambda: r(B, D))
def steps_of_an_inner_optimisation(p, x):
    weights, z = p, torch.zeros_like(x, requires_grad=True)
    for _ in range(2):
        grads = torch.autograd.grad(net(weights, x + z).square(), [*weights.values(), z], create_graph=True)
        weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), grads, strict=False)}
        z = z - 0.1 * grads[-1]
    return net(weights, z).sin()


@case(OTHERS, params, lambda: r(B, D))
def an_adversarial_example(p, x):
    near = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(net(p, near), near)
    return net(p, (x + 0.1 * g.sign()).detach()).sin()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
@pytest.mark.parametrize("name", [*IMAGES, *OTHERS])
def test_every_strategy_is_exact(name, strategy):
    loss, make, batch = (IMAGES | OTHERS)[name]
    params, batch = make(), batch()
    expected = oracle.per_example_grads(loss, params, batch)
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)
    norms = pegrad.per_example_norm(loss, strategy=strategy)(params, batch)
    oracle.assert_close(norms, [oracle.norms(expected)])
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))


@pytest.mark.parametrize("name", IMAGES)
def test_images_under_a_vmap_are_images_of_an_example(name):
    """Catches: a rule that steps aside, so that each example has a copy of every weight."""
    loss, make, batch = IMAGES[name]
    uses = pegrad.explain(loss, make(), batch()).uses
    assert uses
    assert not [use for use in uses if use.norm == "copies"]
    assert all(use.x[0] % B == use.g[0] % B == 0 for use in uses)


def test_written_out_or_by_vmap_the_sites_are_the_same():
    """Catches: a detour that costs more than the axis written out."""
    params, images = {"k": r(4, 2, 3, 3), "b": r(4), "w": r(4, D)}, r(B, A, 2, 6, 6)

    def head(p, y):
        return F.linear(y.relu().mean((2, 3)), p["w"].T).sin().sum()

    def written_out(p, images):
        return head(p, F.conv2d(images, p["k"], p["b"]))

    def mapped(p, images):
        return vmap(lambda t: head(p, F.conv2d(t[None], p["k"], p["b"])))(images).sum()

    ways = [
        [(use.leaves, use.norm, use.sum, use.numbers) for use in pegrad.explain(loss, params, images).uses]
        for loss in (written_out, mapped)
    ]
    assert ways[0] == ways[1]


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_random_numbers_of_a_vmap_are_drawn_as_it_is_told(strategy):
    """Catches: one mask for all images where each should have its own, or the other way round."""
    seen = {}

    def loss(p, images, randomness):
        masks = vmap(lambda t: F.dropout(torch.ones_like(t), 0.5), randomness=randomness)(images)
        return vmap(lambda t: F.linear(t, p).sum())(images).sum(), masks

    for randomness in ("different", "same"):
        one = pegrad.per_example_value_and_grad(
            lambda p, x, randomness=randomness: loss(p, x, randomness), strategy=strategy
        )
        seen[randomness] = one(r(40, 40), r(B, 2, 40)).aux
    assert not torch.equal(seen["different"][:, 0], seen["different"][:, 1])
    assert torch.equal(seen["same"][:, 0], seen["same"][:, 1])


def _by_what_the_examples_share(p, x):
    shared = torch.zeros(D, dtype=x.dtype, requires_grad=True)
    (g,) = torch.autograd.grad(((x + shared) @ p).sin().sum(), shared, create_graph=True)
    return g.square().sum()


def _autograd_under_a_vmap(p, x):
    def one(t):
        h = (x * t) @ p
        return torch.autograd.grad(h.sin().sum(), h, create_graph=True)[0].sum()

    return vmap(one)(x).sum()


def _batched_autograd(p, x):
    h = x @ p
    starts = torch.eye(D, dtype=x.dtype)
    return torch.autograd.grad(h.sin(), h, starts, is_grads_batched=True, create_graph=True)[0].square().sum()


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
@pytest.mark.parametrize("loss", [_by_what_the_examples_share, _autograd_under_a_vmap, _batched_autograd])
def test_what_autograd_cannot_tell_apart_is_refused(loss, strategy):
    """Catches: the gradients of all examples added up."""
    with pytest.raises(pegrad.StrategyError, match=r"torch\.autograd\.grad"):
        pegrad.per_example_norm(loss, strategy=strategy)(r(D, D), r(B, D))


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_the_loss_cannot_swallow_that_it_runs_again(strategy):
    """Catches: `except Exception` around a gradient, and another path taken than in the plain loop."""

    def loss(p, x):
        h = x @ p
        try:
            (g,) = torch.autograd.grad(h.sin().sum(), h, create_graph=True)
        except Exception:
            g = h
        return (g * h).sum()

    params, x = r(D, D), r(B, D)
    found = pegrad.per_example_grad(loss, strategy=strategy)(params, x)
    oracle.assert_close([found], oracle.per_example_grads(loss, params, x))
