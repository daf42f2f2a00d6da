"""Batches that are made to move a clipped sum further than its sensitivity, and the measure of how far they do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

import pegrad

NAMESPACE = "pegrad"


class Attack(NamedTuple):
    """A loss, its parameters, a batch of ordinary examples, and one that is not."""

    loss: Callable[[Any, Any], Tensor]
    params: Any
    batch: Any
    row: Any
    clip_norm: Any = 1.0


def doubled(attack: Attack) -> Attack:
    """The same attack on two leaves at once, and on a third, made in part of the first: for clipping by groups."""
    leaf = optree.tree_leaves(attack.params, namespace=NAMESPACE)[0]

    def loss(params: Any, example: Any) -> Tensor:
        between = optree.tree_map(lambda t: t + params["c"].to(t.dtype) * t, params["a"], namespace=NAMESPACE)
        return attack.loss(between, example) + attack.loss(params["b"], example)

    params = {"a": attack.params, "b": attack.params, "c": torch.zeros((), dtype=leaf.dtype)}
    return attack._replace(loss=loss, params=params)


ATTACKS: dict[str, Callable[[], Attack]] = {}


def attack(make: Callable[[], Attack]) -> Callable[[], Attack]:
    ATTACKS[make.__name__] = make
    return make


def stacked_with(batch: Any, row: Any, at: int) -> Any:
    """Put a row into a batch."""
    return optree.tree_map(lambda t, r: torch.cat([t[:at], r[None], t[at:]]), batch, row, namespace=NAMESPACE)


def movement(attack: Attack, strategy: Any, *, at: int = 0, microbatch_size: Any = None, **options: Any) -> float:
    """How far the row moves the clipped sum, over the sensitivity: the larger of absence and masking."""
    function = pegrad.clipped_grad(
        attack.loss, clip_norm=attack.clip_norm, strategy=strategy, microbatch_size=microbatch_size, **options
    )
    batch = stacked_with(attack.batch, attack.row, at)
    rows = optree.tree_leaves(batch, namespace=NAMESPACE)[0].shape[0]
    whole = function(attack.params, batch).grads
    mask = torch.arange(rows) != at
    return (
        max(
            distance(whole, function(attack.params, attack.batch).grads),
            distance(whole, function(attack.params, batch, mask).grads),
        )
        / function.sensitivity
    )


def distance(a: Any, b: Any) -> float:
    """Euclidean distance over all leaves, in float64."""
    leaves = [optree.tree_leaves(tree, namespace=NAMESPACE) for tree in (a, b)]
    squares = [(x.double() - y.double()).square().sum() for x, y in zip(*leaves, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


def bilinear(params: Tensor, example: tuple[Tensor, Tensor]) -> Tensor:
    """Positions `(T, D)` and upstream gradients `(T, p)`: the gradient is `gᵀ x`, whatever both are."""
    x, g = example
    return (F.linear(x, params) * g).sum()


def convolution(params: Tensor, example: tuple[Tensor, Tensor]) -> Tensor:
    image, g = example
    return (F.conv2d(image, params, padding=1) * g).sum()


def blocks(params: Tensor, example: tuple[Tensor, Tensor]) -> Tensor:
    """Positions `(E, T, D)` of E maps side by side, and upstream gradients `(E, T, p)`."""
    x, g = example
    return (torch.bmm(x, params) * g).sum()


def embedding(params: Tensor, example: tuple[Tensor, Tensor]) -> Tensor:
    tokens, g = example
    return (F.embedding(tokens, params) * g).sum()


def ordinary(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


@attack
def tokens_that_cancel():
    g = torch.zeros(2, 4)
    g[0, 0], g[1, 0] = 1e14, -1e14
    batch = torch.zeros(256, 2, dtype=torch.int64), torch.full((256, 2, 4), 1.0)
    return Attack(embedding, torch.zeros(3, 4), batch, (torch.zeros(2, dtype=torch.int64), g))


@attack
def tokens_that_cancel_a_little():
    g = torch.zeros(2, 4)
    g[0, 0], g[1, 0] = 1e7, -1e7
    torch.manual_seed(1)  # sums of ones would be whole numbers, which lose nothing beside 1e7
    batch = torch.zeros(256, 2, dtype=torch.int64), torch.rand(256, 2, 4)
    return Attack(embedding, torch.zeros(3, 4), batch, (torch.zeros(2, dtype=torch.int64), g))


@attack
def positions_that_cancel_a_little():
    torch.manual_seed(1)
    g = torch.tensor([[1e7], [-1e7]]).expand(2, 3)
    batch = torch.rand(100, 2, 4), torch.rand(100, 2, 3)
    return Attack(bilinear, torch.zeros(3, 4), batch, (torch.ones(2, 4), g))


@attack
def positions_that_cancel():
    g = torch.tensor([[1e14], [-1e14]]).expand(2, 3)
    batch = torch.ones(100, 2, 4), torch.ones(100, 2, 3)
    return Attack(bilinear, torch.zeros(3, 4), batch, (torch.ones(2, 4), g))


@attack
def many_positions_that_cancel_by_halves():
    g = torch.full((1024, 64), 300.0)
    g[512:] *= -1
    batch = torch.ones(64, 1024, 64), torch.ones(64, 1024, 64)
    return Attack(bilinear, torch.zeros(64, 64), batch, (torch.ones(1024, 64), g))


@attack
def a_constant_image():
    g = torch.full((8, 8, 8), 1e9)
    g[:, ::2] *= -1
    batch = ordinary(64, 4, 8, 8), ordinary(64, 8, 8, 8)
    return Attack(convolution, torch.zeros(8, 4, 3, 3), batch, (torch.ones(4, 8, 8), g))


@attack
def constant_images_in_a_wide_layer():
    g = torch.full((64, 8, 8), 1e5)
    g[:, ::2] *= -1
    batch = torch.ones(32, 64, 8, 8), torch.ones(32, 64, 8, 8)
    return Attack(convolution, torch.zeros(64, 64, 3, 3), batch, (torch.ones(64, 8, 8), g))


@attack
def images_of_one_example_that_cancel():
    torch.manual_seed(1)
    g = torch.tensor([1e7, -1e7]).reshape(2, 1, 1, 1).expand(2, 8, 8, 8)
    batch = torch.rand(64, 2, 4, 8, 8), torch.rand(64, 2, 8, 8, 8)
    return Attack(convolution, torch.zeros(8, 4, 3, 3), batch, (torch.ones(2, 4, 8, 8), g))


@attack
def images_of_one_example_that_nearly_cancel_in_a_wide_layer():
    torch.manual_seed(1)
    image, g = torch.rand(256, 3, 3), 1e3 * torch.rand(256, 3, 3)
    row = torch.stack([image, image + 1e-4 * torch.rand(256, 3, 3)]), torch.stack([g, -g])
    return Attack(convolution, torch.zeros(256, 256, 3, 3), (ordinary(4, 2, 256, 3, 3), ordinary(4, 2, 256, 3, 3)), row)


@attack
def a_block_whose_positions_cancel():
    torch.manual_seed(1)
    g = torch.rand(3, 2, 4)
    g[1] = torch.tensor([[1e7], [-1e7]])
    batch = torch.rand(100, 3, 2, 4), torch.rand(100, 3, 2, 4)
    return Attack(blocks, torch.zeros(3, 4, 4), batch, (torch.ones(3, 2, 4), g))


@attack
def a_common_component_in_blocks():
    torch.manual_seed(1)
    x, g = torch.randn(2, 8, 512) + 1e4 * torch.randn(2, 1, 512), torch.randn(2, 8, 512)
    batch = ordinary(4, 2, 8, 512), ordinary(4, 2, 8, 512)
    return Attack(blocks, torch.zeros(2, 512, 512), batch, (x, g - g.mean(1, keepdim=True)))


def common_component(size: float, positions: int, width: int, seed: int = 1) -> Attack:
    torch.manual_seed(seed)
    x = torch.randn(positions, width) + size * torch.randn(width)
    g = torch.randn(positions, width)
    g = g - g.mean(0)
    batch = ordinary(6, positions, width), ordinary(6, positions, width)
    return Attack(bilinear, torch.zeros(width, width), batch, (x, g))


for _size in (1.0, 3.0, 10.0, 1e4, 1e7, 1e12):
    ATTACKS[f"a_common_component_of_{_size:g}"] = lambda size=_size: common_component(size, 8, 512)
ATTACKS["a_common_component_of_few_positions"] = lambda: common_component(100.0, 4, 512, seed=2)


@attack
def a_faint_difference_on_a_common_component():
    torch.manual_seed(1)
    x = 1e-3 * torch.randn(8, 1024) + torch.randn(1024)
    g = torch.randn(8, 1024)
    return Attack(bilinear, torch.zeros(1024, 1024), (ordinary(4, 8, 1024), ordinary(4, 8, 1024)), (x, g - g.mean(0)))


@attack
def a_negative_square_beside_another_leaf():
    def loss(params, example):
        return bilinear(params["w"], example[:2]) + (params["v"] * example[2]).sum()

    torch.manual_seed(1)
    common = 3e4 * torch.randn(512)
    x = common + torch.randn(8, 512)
    g = torch.randn(8, 512)
    row = (x, g - g.mean(0), torch.full((4,), 1000.0))
    batch = (ordinary(4, 8, 512), ordinary(4, 8, 512), torch.ones(4, 4))
    return Attack(loss, {"w": torch.zeros(512, 512), "v": torch.zeros(4)}, batch, row)


@attack
def products_that_vanish():
    torch.manual_seed(0)
    x, g = 1.2e19 * torch.randn(64, 256), 2e-23 * torch.randn(64, 256)
    batch = ordinary(4, 64, 256), ordinary(4, 64, 256)
    return Attack(bilinear, torch.zeros(256, 256), batch, (x, g), clip_norm=1e-3)


@attack
def products_of_few_positions_that_vanish():
    torch.manual_seed(0)
    x, g = 1e17 * torch.randn(2, 256), 1e-24 * torch.randn(2, 256)
    batch = ordinary(4, 2, 256), ordinary(4, 2, 256)
    return Attack(bilinear, torch.zeros(256, 256), batch, (x, g), clip_norm=1e-6)


@attack
def products_that_overflow():
    x, g = torch.full((4, 8), 1e25), torch.full((4, 8), 1e-10)
    return Attack(bilinear, torch.zeros(8, 8), (ordinary(4, 4, 8), ordinary(4, 4, 8)), (x, g))


@attack
def a_tiny_gradient():
    x, g = torch.full((4, 8), 1e-25), torch.full((4, 8), 1e25)
    return Attack(bilinear, torch.zeros(8, 8), (ordinary(4, 4, 8), ordinary(4, 4, 8)), (x, g))


def radial(width: int, rows: int, seed: int) -> Attack:
    """Make a gradient along the weight itself: what weight normalisation leaves out."""

    def loss(params, example):
        x, g = example
        v = params["v"]
        return (F.linear(x, v / v.norm(dim=1, keepdim=True)) * g).sum()

    torch.manual_seed(seed)
    v = torch.randn(width, width)
    x = 1e12 * v / v.norm(dim=1, keepdim=True)
    batch = ordinary(rows, width, width), ordinary(rows, width, width)
    return Attack(loss, {"v": v}, batch, (x, torch.eye(width)))


ATTACKS["a_gradient_that_weight_normalisation_leaves_out"] = lambda: radial(16, 64, 0)
ATTACKS["a_gradient_that_a_small_weight_normalisation_leaves_out"] = lambda: radial(4, 200, 1)


@attack
def a_gradient_of_which_normalisation_leaves_rounding_alone():
    def loss(params, example):
        x, g = example
        return (F.linear(x, params / params.norm(dim=1, keepdim=True)) * g).sum()

    torch.manual_seed(19)  # one number a row: its direction is its sign, and nothing of its gradient is left
    params, batch = torch.randn(4, 1), (torch.randn(1, 1, 1), torch.randn(1, 1, 4))
    row = torch.randn(1, 1), 1e8 * torch.randn(1, 4)
    return Attack(loss, params, batch, row, clip_norm=10.0)


@attack
def a_tied_leaf_whose_uses_cancel():
    def loss(params, example):
        x, g = example
        return ((F.linear(x, params) - F.linear(x.flip(0), params)) * g).sum()

    x = torch.tensor([[1e10, 0.0], [1e10, 0.0]])
    batch = ordinary(100, 2, 2), ordinary(100, 2, 3)
    return Attack(loss, torch.zeros(3, 2), batch, (x, torch.ones(2, 3)))


def table(params: Tensor, example: tuple[Tensor, ...]) -> Tensor:
    """A table `(V, d)` looked up and multiplied with: a gradient from each use, whatever both are."""
    tokens, lines, x, g = example
    return (F.embedding(tokens, params) * lines).sum() + (F.linear(x, params) * g).sum()


def cancelling_table(size: float, *, transposed: bool = False) -> Attack:
    """The head takes away again, but for a little, what the embedding adds; the table is too large to be stacked."""
    torch.manual_seed(4)
    tokens = torch.randint(64, (8,))
    lines = size * (1 + torch.rand(8, 64))
    row = tokens, lines, lines + torch.randn(8, 64), -F.one_hot(tokens, 64).float()
    batch = torch.randint(64, (100, 8)), *(ordinary(100, 8, 64) for _ in range(3))
    if transposed:
        return Attack(lambda params, example: table(params.T, example), torch.zeros(64, 64), batch, row)
    return Attack(table, torch.zeros(64, 64), batch, row)


@attack
def an_embedding_and_a_head_that_cancel_a_little():
    return cancelling_table(30.0)


@attack
def an_embedding_and_a_head_that_cancel():
    return cancelling_table(1e4)


@attack
def an_embedding_and_a_head_that_cancel_far():
    return cancelling_table(1e9, transposed=True)


@attack
def a_table_looked_up_where_it_cancels():
    """The head is ordinary."""
    attacked = cancelling_table(1.0)
    lines = torch.zeros(8, 64)
    lines[0], lines[1] = 1e7, -1e7
    return attacked._replace(row=(torch.zeros(8, dtype=torch.int64), lines, ordinary(8, 64), ordinary(8, 64)))


@attack
def a_kernel_whose_uses_cancel():
    def loss(params, example):
        image, g = example
        return ((F.conv2d(image, params, padding=1) - F.conv2d(image + 1e-3, params, padding=1)) * g).sum()

    batch = ordinary(100, 4, 8, 8), ordinary(100, 8, 8, 8)
    return Attack(loss, torch.zeros(8, 4, 3, 3), batch, (1e6 * ordinary(4, 8, 8), ordinary(8, 8, 8)))


@attack
def a_backward_function_that_is_not_linear():
    class Sign(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g.sign()

    def loss(params, x):
        return (Sign.apply(F.linear(x, params)) * 1e-3).sum() * 1.0

    return Attack(loss, torch.zeros(8, 8), ordinary(8, 8), torch.full((8,), 100.0))


@attack
def a_half_normalised_parameter():
    def loss(params, x):
        return (x * (params / params.norm())).sum()

    torch.manual_seed(0)
    p = torch.randn(64).bfloat16()
    batch = torch.randn(300, 64).bfloat16()
    return Attack(loss, p, batch, batch[0] * 3)
