"""Losses over which every strategy is tested: one for each way a parameter can meet an operation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

B = 5


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """A loss, and how to make its parameters and a batch of B examples (float64)."""

    loss: Callable[[Any, Any], Any]
    make: Callable[[], tuple[Any, Any]]


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES: dict[str, Case] = {}


def case(make: Callable[[], tuple[Any, Any]]) -> Callable[[Callable], Callable]:
    def register(loss: Callable) -> Callable:
        CASES[loss.__name__] = Case(loss, make)
        return loss

    return register


@case(lambda: ({"w": r(4, 3), "b": r(3)}, (r(B, 4), torch.arange(B) % 3)))
def matmul_plus_bias(params, example):
    x, y = example
    return F.cross_entropy(x @ params["w"] + params["b"], y)


@case(lambda: ([Affine(r(6, 4), r(6)), {"last": Affine(r(1, 6), None), "nothing": None}], r(B, 4)))
def mlp_in_a_nested_tree(params, x):
    first, rest = params
    hidden = torch.tanh(F.linear(x, first.weight, first.bias))
    return F.linear(hidden, rest["last"].weight).sum(), {"hidden": hidden}


@case(lambda: ({"w": r(5, 3), "b": r(5)}, r(B, 2, 7, 3)))
def linear_over_positions(params, x):
    return F.linear(x, params["w"], params["b"]).sin().square().sum()


@case(lambda: ({"w": r(3, 3)}, r(B, 4, 3)))
def tied_weight_used_three_times(params, x):
    y = torch.tanh(x @ params["w"])
    y = torch.tanh(F.linear(y, params["w"]))
    return (y * params["w"].sum()).sum()


@case(lambda: ({"embed": r(7, 4), "out_bias": r(7)}, torch.randint(0, 7, (B, 6))))
def tied_embedding(params, tokens):
    x = F.embedding(tokens, params["embed"], padding_idx=1).cumsum(0)
    return F.cross_entropy(F.linear(x, params["embed"], params["out_bias"]), tokens)


@case(lambda: ({"embed": r(9, 4), "position": r(6, 4)}, torch.tensor([[1, 1, 1, 2, 2, 0]] * (B - 1) + [[3] * 6])))
def embedding_with_repeated_tokens(params, tokens):
    x = F.embedding(tokens, params["embed"]) + params["position"]
    return x.cumsum(0).sin().sum()


@case(lambda: ({"a": {"w": r(6, 2, 3, 2), "b": r(6)}, "c": {"w": r(4, 6, 3, 3)}}, (r(B, 4, 9, 8), r(B))))
def convolutions_with_in_place_activation(params, example):
    x, y = example
    x = F.conv2d(x, params["a"]["w"], params["a"]["b"], stride=2, padding=(1, 2), groups=2).relu_()
    x = F.conv2d(x[None], params["c"]["w"], padding="same")
    return (x.sum() - y) ** 2


@case(lambda: ({"w": r(4, 3, 3), "b": r(4), "v": r(4, 2, 5)}, r(B, 3, 11)))
def convolution_and_its_transpose_1d(params, x):
    y = F.conv1d(x, params["w"], params["b"], dilation=2).tanh()
    return F.conv_transpose1d(y, params["v"], stride=3, output_padding=1, padding=2).square().sum()


@case(lambda: ({"w": r(4, 2, 2, 3, 2), "v": r(4, 1, 2, 2, 2)}, r(B, 2, 4, 5, 4)))
def convolution_and_its_transpose_3d(params, x):
    y = F.conv3d(x, params["w"], padding=1).tanh()
    return F.conv_transpose3d(y, params["v"], groups=2, stride=(1, 2, 1)).square().sum()


@case(lambda: ({"w": r(4, 3, 3, 3)}, r(B, 3, 8, 8)))
def one_convolution_at_two_sizes(params, x):
    y = F.conv2d(x, params["w"], padding=1).sin().sum()
    return y + F.conv2d(x[:, ::2, ::2], params["w"]).square().sum()


@case(lambda: ({"w": r(4, 3, 3, 3)}, r(B, 2, 3, 6, 6)))
def convolution_of_several_images_an_example(params, images):
    return F.conv2d(images, params["w"]).tanh().square().sum()


@case(lambda: ({"g": r(6), "b": r(6), "s": r(4), "t": r(4)}, (r(B, 3, 6), r(B, 4, 5, 5))))
def normalisations(params, example):
    x, image = example
    y = F.layer_norm(x, (6,), params["g"], params["b"]).sin().sum() + F.rms_norm(x, (6,), params["g"]).cos().sum()
    z = F.group_norm(image[None], 2, params["s"], params["t"])
    return y + z.sin().sum() + F.instance_norm(image[None], weight=params["s"], bias=params["t"]).cos().sum()


@case(lambda: ({"scale": r(1, 4), "shift": r(3, 1), "token": r(1, 4), "divisor": r(4) + 5}, r(B, 3, 4)))
def broadcasts(params, x):
    y = torch.cat([params["token"], x * params["scale"] + params["shift"]])
    y = 1 - y / params["divisor"] - params["scale"]
    return (params["divisor"] * y).sin().sum()


@case(lambda: ({"g": r(4, 1), "v": r(4, 3)}, r(B, 3)))
def weight_norm(params, x):
    weight = params["g"] * params["v"] / params["v"].norm(dim=1, keepdim=True)
    return F.linear(x, weight).square().sum()


@case(lambda: ({"w": r(4, 3, 3, 3), "gain": r(4, 1, 1, 1)}, r(B, 3, 6, 6)))
def weight_standardisation(params, x):
    w = params["w"]
    mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, (w - mean) / std * params["gain"]).sin().sum()


@case(lambda: ({"used": r(3), "unused": r(2, 2)}, r(B, 3)))
def unused_parameter(params, x):
    return (params["used"] * x).sum()


@case(lambda: ({"w": r(3), "v": r(3)}, r(B, 3)))
def some_gradients_stopped(params, x):
    return (params["w"] * x).sin().sum() + (params["v"].detach() * x).sum()


@case(lambda: ({"w": r(5, 4), "v": r(4, 4), "bias": r(5)}, (r(B, 3, 4), r(B, 4))))
def matrix_products_of_every_kind(params, example):
    x, y = example
    w, v = params["w"], params["v"]
    a = torch.einsum("td,ed->te", x, w) + torch.addmm(params["bias"], x, w.T)
    b = (v @ y).sum() + torch.matmul(x, v).sin().sum() + (y @ v).cos().sum() + torch.mm(x, v).tanh().sum()
    return a.sin().sum() + b + torch.mv(v, y).square().sum()


@case(lambda: ({"qkv": r(12, 4), "out": r(4, 4)}, r(B, 6, 4)))
def attention(params, x):
    q, k, v = F.linear(x, params["qkv"]).unflatten(-1, (3, 2, 2)).permute(1, 2, 0, 3)
    y = F.scaled_dot_product_attention(q, k, v)
    return F.linear(y.transpose(0, 1).flatten(1), params["out"]).square().sum()


@case(lambda: ({"scale": r(), "w": r(3)}, r(B, 3)))
def scalar_parameter(params, x):
    return params["scale"].exp() * (params["w"] * x).sin().sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular", groups=2),
        )
        self.head = nn.Linear(4 * 6 * 6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


NET = Net()


@case(lambda: (dict(NET.named_parameters()), (r(B, 2, 8, 8), torch.arange(B) % 3)))
def module(params, example):
    image, label = example
    return F.cross_entropy(functional_call(NET, params, (image[None],))[0], label)


LSTM, GRU = nn.LSTM(3, 4, 2, bidirectional=True).double(), nn.GRU(8, 2).double()


@case(lambda: ({"lstm": dict(LSTM.named_parameters()), "gru": dict(GRU.named_parameters())}, r(B, 5, 3)))
def recurrent_modules(params, x):
    output, (_, cells) = functional_call(LSTM, params["lstm"], (x,))
    return functional_call(GRU, params["gru"], (output,))[1].square().sum() + cells.sin().sum()


@case(lambda: ({"w": r(3, 4), "u": r(4, 4), "b": r(4)}, r(B, 5, 3)))
def recurrence(params, x):
    h = x.new_zeros(4)
    for t in range(x.shape[0]):
        h = torch.tanh(x[t] @ params["w"] + h @ params["u"] + params["b"])
    return h.square().sum()
