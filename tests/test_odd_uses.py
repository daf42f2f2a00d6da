"""Uses at the edge of what an operation takes: right under every strategy, none fails."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
import pegrad
from cases import r

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

B = 3
Make = Callable[[], tuple[dict[str, Tensor], Tensor | tuple[Tensor, ...]]]
CASES: dict[str, tuple[Callable, Make]] = {}


def case(make: Make) -> Callable[[Callable], Callable]:
    def register(loss: Callable) -> Callable:
        CASES[loss.__name__] = loss, make
        return loss

    return register


@case(lambda: ({"w": r(4, 3), "b": r(4)}, (r(B, 0, 3), r(B))))
def linear_over_no_positions(p, example):
    """Catches: a reshape to -1 rows of a tensor without numbers."""
    x, y = example
    return F.linear(x, p["w"], p["b"]).sum() + y * p["b"].sum()


@case(lambda: ({"w": r(4, 0), "v": r(0, 3), "b": r(4)}, (r(B, 2, 0), r(B, 2, 3))))
def linear_without_features(p, example):
    """Catches: the same, where it is the features that are none."""
    x, y = example
    return F.linear(x, p["w"], p["b"]).sin().sum() + F.linear(y, p["v"]).sum()


@case(lambda: ({"w": r(5, 4), "v": r(4, 3)}, (r(B, 0, 4), r(B, 3))))
def products_over_no_positions(p, example):
    """Catches: the same in matrix products and contractions."""
    x, y = example
    return (x @ p["w"].T).sum() + torch.einsum("td,ed->te", x, p["w"]).sum() + (p["v"] @ y).sum()


TABLE = r(B, 4)


@case(lambda: ({"w": r(5, 2), "b": r(5)}, torch.tensor([[2, 0], [1, 3], [0, 2]])))
def columns_of_a_table(p, indices):
    """Catches: a batch whose axis PyTorch puts after another of its size, taken for the first."""
    return F.linear(TABLE[:, indices], p["w"], p["b"]).sin().sum()


@case(lambda: ({"table": r(7, 4)}, torch.tensor([2, 0, 2])))
def embedding_of_one_token(p, token):
    """Catches: tokens taken to have an axis of positions."""
    return F.embedding(token, p["table"]).sin().sum()


@case(lambda: ({"table": r(7, 4)}, torch.tensor([2, 0, 2])))
def embedding_of_one_token_with_padding(p, token):
    """Catches: the same where the token may be padding."""
    return F.embedding(token, p["table"], padding_idx=0).sin().sum()


@case(lambda: ({"table": r(7, 4)}, torch.zeros(B, 0, dtype=torch.int64)))
def embedding_of_no_tokens(p, tokens):
    """Catches: a reshape of a tensor without numbers."""
    return F.embedding(tokens, p["table"]).sum() + 0 * p["table"].sum()


@case(lambda: ({"s": r(4), "t": r(4)}, r(B, 5, 5, 4)))
def normalisations_of_strided_images(p, image):
    """Catches: a kernel of PyTorch's that takes contiguous images only, run on others."""
    image = image.permute(2, 0, 1)[None]
    y = F.group_norm(image, 2, p["s"], p["t"]).sin().sum()
    return y + F.instance_norm(image, weight=p["s"], bias=p["t"]).cos().sum()


@case(lambda: ({"s": r(4), "t": r(4)}, (r(B, 2, 4), r(B, 4))))
def normalisations_without_space(p, example):
    """Catches: images taken to have spatial axes."""
    x, _ = example
    return F.group_norm(x, 2, p["s"], p["t"]).sin().sum()


@case(lambda: ({"s": r(4), "t": r(4)}, (r(B, 0, 4), r(B))))
def normalisation_over_no_positions(p, example):
    """Catches: a kernel run on no rows."""
    x, y = example
    return F.layer_norm(x, (4,), p["s"], p["t"]).sum() + y * (p["s"] * p["t"]).sum()


@case(lambda: ({"mask": r(6, 6), "w": r(12, 4)}, r(B, 6, 4)))
def attention_whose_mask_is_learned(p, x):
    """Catches: the fused kernel picked because nobody seems to need the mask's gradient."""
    q, k, v = F.linear(x, p["w"]).unflatten(-1, (3, 2, 2)).permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=p["mask"]).sin().sum()


@case(lambda: ({"slope": r(2, 1, 1), "w": r(12, 4)}, (r(B, 6, 4), r(B, 6, 6))))
def attention_whose_mask_depends_on_a_parameter(p, example):
    """Catches: the same where the mask is made of a parameter and the example."""
    x, distances = example
    q, k, v = F.linear(x, p["w"]).unflatten(-1, (3, 2, 2)).permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=p["slope"] * distances).sin().sum()


@case(lambda: ({"w": r(3, 4)}, r(B, 3, 4)))
def covariance(p, x):
    """Catches: an operation whose batching rule asks for values."""
    return torch.cov(x * p["w"]).sin().sum() + torch.cov(x + p["w"], correction=0).sum()


@case(lambda: ({"w": r(4), "v": r(4, 2)}, (r(B, 4), r(B, 4, 3))))
def stacked_columns(p, example):
    """Catches: a parameter beside an example in a list of tensors."""
    x, y = example
    return torch.column_stack([x, p["w"]]).sin().sum() + torch.column_stack([p["v"], y]).cos().sum()


@case(lambda: ({"q": r(2, 8, 4), "slope": r(8, 8)}, (r(B, 2, 8, 4), r(B, 8, 8))))
def attention_whose_query_and_mask_are_learned(p, example):
    """Catches: a kernel that cannot differentiate its mask, picked for a query that is batched in copies only."""
    x, distances = example
    return F.scaled_dot_product_attention(p["q"][None], x[None], x[None], attn_mask=p["slope"] * distances).sin().sum()


@case(lambda: ({"q": r(2, 8, 4), "slope": r(8, 8)}, r(B, 8, 8)))
def attention_of_which_only_the_mask_is_batched(p, distances):
    """Catches: the same where no example has a part in query, key and value."""
    q = p["q"][None]
    return F.scaled_dot_product_attention(q, 2 * q, q.cos(), attn_mask=p["slope"] * distances).sin().sum()


@case(lambda: ({"image": r(1, 4, 3, 3), "shift": r(4)}, r(B, 4)))
def group_normalisation_of_a_learned_image(p, scale):
    """Catches: a kernel that takes contiguous images only, run on copies that share their memory."""
    return F.group_norm(p["image"], 2, scale).sin().sum() + F.group_norm(p["image"], 2, scale, p["shift"]).cos().sum()


@case(lambda: ({"w": r(4, 2, 3, 3), "b": r(4)}, (r(B, 0, 2, 6, 6), r(B))))
def convolution_of_no_images(p, example):
    """Catches: a kernel run on no rows."""
    x, y = example
    return F.conv2d(x, p["w"], p["b"]).sum() + y * p["b"].sum() + F.conv_transpose2d(x, p["w"].transpose(0, 1)).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["naive", "vmap", "grouped_conv"])
def test_autocast_inside_a_convolutional_loss(strategy, dtype):
    """Catches: an output in half precision, given back to a rule whose weight is in float32."""
    x = torch.randn(B, 2, 8, 8)
    params = {"b": torch.randn(4), "v": torch.randn(4, 2, 2, 2), "w": torch.randn(4, 1, 3, 3)}

    def plain(p, x):
        y = F.conv2d(x, p["w"], p["b"], groups=2, padding="same").sin()
        return F.conv_transpose2d(y, p["v"], stride=2).float().square().mean()

    def loss(p, x):
        with torch.autocast("cpu", dtype):
            return plain(p, x)

    out = pegrad.per_example_value_and_grad(loss, strategy=strategy)(params, x)
    native = oracle.per_example_grads(plain, params, x)
    assert {g.dtype for g in out.grads.values()} == {out.losses.dtype} == {torch.float32}
    for got, want in zip(out.grads.values(), native, strict=True):
        assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    exact = pegrad.per_example_value_and_grad(plain, strategy=strategy)(params, x)
    assert (out.losses != exact.losses).any(), "autocast did nothing"


@pytest.mark.parametrize("strategy", ["vmap", "grouped_conv"])
def test_autocast_around_the_call_of_a_convolutional_loss(strategy):
    """Catches: the same where the backward pass runs under autocast as well."""
    params, x = {"w": torch.randn(4, 2, 3, 3)}, torch.randn(B, 2, 8, 8)

    def loss(p, x):
        return F.conv2d(x, p["w"]).float().sin().sum()

    with torch.autocast("cpu", torch.bfloat16):
        grads = pegrad.per_example_grad(loss, strategy=strategy)(params, x)
    want = oracle.per_example_grads(loss, params, x)
    assert (grads["w"] - want[0]).abs().max() <= 0.05 * want[0].abs().max()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
@pytest.mark.parametrize("name", CASES)
def test_odd_use(name, strategy):
    loss, make = CASES[name]
    params, batch = make()
    expected = oracle.per_example_grads(loss, params, batch)
    norms = oracle.norms(expected)
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)
    oracle.assert_close(pegrad.per_example_norm(loss, strategy=strategy)(params, batch), [norms])
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))
