"""PyTorch's own functions that are written in Python are seen through: attention and what is made of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import oracle
import pegrad
from cases import r
from pegrad.tracing.inlining import inlined

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

B, T, S, D = 3, 5, 4, 8
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
Case = tuple[Callable[[], nn.Module], Callable[[Callable, Any], Tensor], Callable[[], Any]]
CASES: dict[str, Case] = {}


def case(
    make: Callable[[], nn.Module], batch: Callable[[], Any] = lambda: r(B, T, D)
) -> Callable[[Callable], Callable]:
    def register(loss: Callable) -> Callable:
        CASES[loss.__name__] = make, loss, batch
        return loss

    return register


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: _spread(nn.MultiheadAttention(D, 2, **options))


def encoder_layer(**options: Any) -> nn.Module:
    return _spread(nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, **options))


def decoder_layer(**options: Any) -> nn.Module:
    return _spread(nn.TransformerDecoderLayer(D, 2, 16, dropout=0.0, **options))


def _spread(module: nn.Module) -> nn.Module:
    for parameter in module.double().parameters():  # biases start as zeros, scales as ones
        nn.init.normal_(parameter, std=0.5)
    return module


@case(attention())
def self_attention(f, x):
    x = x[:, None]
    return f(x, x, x, need_weights=False)[0].sin().sum()


@case(attention(batch_first=True))
def self_attention_with_its_weights(f, x):
    x = x[None]
    y, weights = f(x, x, x)
    return y.sin().sum() + weights.cos().sum()


@case(attention(batch_first=True, bias=False))
def self_attention_with_each_heads_weights(f, x):
    x = x[None]
    y, weights = f(x, x, x, average_attn_weights=False)
    return y.sin().sum() + weights.cos().sum()


@case(attention())
def self_attention_without_a_batch(f, x):
    return f(x, x, x)[0].sin().sum()


@case(attention(batch_first=True), lambda: (r(B, T, D), r(B, S, D)))
def attention_to_a_memory(f, example):
    x, memory = (part[None] for part in example)
    return f(x, memory, memory, need_weights=False)[0].sin().sum()


@case(attention(batch_first=True), lambda: (r(B, T, D), r(B, S, D), r(B, S, D)))
def attention_of_three(f, example):
    q, k, v = (part[None] for part in example)
    return f(q, k, v)[0].sin().sum()


@case(attention(kdim=6, vdim=3), lambda: (r(B, T, D), r(B, S, 6), r(B, S, 3)))
def attention_of_other_widths(f, example):
    q, k, v = (part[:, None] for part in example)
    return f(q, k, v, need_weights=False)[0].sin().sum()


@case(attention(add_bias_kv=True, add_zero_attn=True, batch_first=True))
def attention_with_a_learned_position(f, x):
    x = x[None]
    return f(x, x, x, attn_mask=CAUSAL, need_weights=False)[0].sin().sum()


@case(attention(batch_first=True), lambda: (r(B, T, D), torch.arange(B) + 2))
def attention_with_padding(f, example):
    x, length = example
    x, padding = x[None], torch.arange(T)[None] >= length
    return f(x, x, x, key_padding_mask=padding)[0].sin().sum()


@case(attention(batch_first=True))
def causal_attention(f, x):
    x = x[None]
    return f(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0].sin().sum()


@case(attention(batch_first=True), lambda: (r(B, T, D), r(B, T, T)))
def attention_with_a_mask_for_each_example(f, example):
    x, mask = example
    x = x[None]
    return f(x, x, x, attn_mask=mask.exp() - 1, need_weights=False)[0].sin().sum()


@case(lambda: encoder_layer(batch_first=True))
def encoder(f, x):
    return f(x[None]).sin().sum()


@case(
    lambda: encoder_layer(batch_first=True, norm_first=True, activation="gelu"), lambda: (r(B, T, D), torch.arange(B))
)
def encoder_with_padding(f, example):
    x, length = example
    padding = torch.where(torch.arange(T)[None] > length, -1e9, 0.0).double()
    return f(x[None], src_mask=CAUSAL, src_key_padding_mask=padding).sin().sum()


@case(lambda: encoder_layer(bias=False))
def encoder_without_a_batch(f, x):
    return f(x).sin().sum()


@case(lambda: decoder_layer(batch_first=True), lambda: (r(B, T, D), r(B, S, D)))
def decoder(f, example):
    x, memory = (part[None] for part in example)
    return f(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True).sin().sum()


@case(lambda: decoder_layer(norm_first=True), lambda: (r(B, T, D), r(B, S, D), torch.arange(B)))
def decoder_with_padding(f, example):
    x, memory, length = example
    padding = torch.arange(S)[None] > length
    return f(x[:, None], memory[:, None], memory_key_padding_mask=padding).sin().sum()


@case(
    lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 2),
    lambda: (r(B, T, D), torch.arange(B) + 1),
)
def stack_of_encoders(f, example):
    x, length = example
    return f(x[None], src_key_padding_mask=torch.arange(T)[None] >= length).sin().sum()


def _problem(name: str, training: bool) -> tuple[Callable, dict[str, Tensor], Any]:
    make, loss, batch = CASES[name]
    torch.manual_seed(0)
    module = make().train(training)
    params = {path: p.detach().clone() for path, p in module.named_parameters()}
    return (lambda p, x: loss(lambda *a, **k: functional_call(module, p, a, k), x)), params, batch()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_strategy_is_exact(name, training):
    """Catches: a site inside attention that is dropped, or counted twice; a fast path taken in evaluation."""
    loss, params, batch = _problem(name, training)
    expected = oracle.per_example_grads(loss, params, batch)
    for strategy in pegrad.STRATEGIES:
        oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)
        norms = pegrad.per_example_norm(loss, strategy=strategy)(params, batch)
        oracle.assert_close(norms, [oracle.norms(expected)])
        out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
        oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_no_weight_is_copied_for_each_example(name, training):
    """Catches: attention taken whole, for which every weight is copied."""
    uses = pegrad.explain(*_problem(name, training)).uses
    copied = {use.leaves for use in uses if use.norm == "copies"}
    assert copied <= {"params['bias_k']", "params['bias_v']"}
    matrices = {use.leaves for use in uses if use.operation == "linear"}
    assert len(matrices) >= 2


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_a_function_given_to_a_function(strategy):
    """Catches: a parameter closed over by an argument that only PyTorch's own code calls."""

    def loss(p, example):
        a, b, c = (part[None] for part in example)

        def distance(x, y):
            return (F.linear(x - y, p["w"]) * p["s"]).square().sum(-1)

        return F.triplet_margin_with_distance_loss(a, b, c, distance_function=distance, margin=50.0)

    params, batch = {"w": r(4, 3), "s": r(4)}, (r(B, 3), r(B, 3), r(B, 3))
    expected = oracle.per_example_grads(loss, params, batch)
    assert expected[0].abs().min() > 0, "the margin is too small"
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))
    assert "linear" in {use.operation for use in pegrad.explain(loss, params, batch, strategy=strategy).uses}


def test_what_has_a_body_to_run():
    """Catches: the user's own code taken for PyTorch's; a builtin taken for Python."""
    body = inlined(F.multi_head_attention_forward)
    assert body is not None
    assert body.__code__ is F.multi_head_attention_forward.__code__
    assert body.__kwdefaults__ == F.multi_head_attention_forward.__kwdefaults__
    assert body.__globals__["linear"] is F.linear
    assert inlined(F.linear) is inlined(torch.sin) is inlined(Tensor.add) is None
    assert inlined(pegrad.operation(lambda x: x)) is None
    assert inlined(F.has_torch_function) is None
