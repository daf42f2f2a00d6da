"""Several uses of one parameter, found together: against the loop, whatever the kernels, and whatever the data."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import oracle
import pegrad
from pegrad.plan.candidates import candidates

B, T, V, D = 3, 4, 7, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def tokens(*shape):
    return torch.randint(V, shape)


def tied(p, x):
    h = torch.tanh(F.embedding(x, p["w"]))
    return F.cross_entropy(h @ p["w"].T, x.roll(1))


def tied_with_padding(p, x):
    h = torch.tanh(F.embedding(x, p["w"], padding_idx=2))
    return F.cross_entropy(F.linear(h, p["w"]), x.roll(1))


def three_kinds(p, x):
    """Two embeddings that differ in their padding, a head, and its transpose."""
    h = torch.tanh(F.embedding(x, p["w"], padding_idx=0) + F.embedding(x.flip(0), p["w"]))
    logits = F.linear(h, p["w"])
    return F.cross_entropy(logits, x) + F.linear(torch.sin(logits), p["w"].T).square().mean()


def table_by_columns(p, x):
    return torch.tanh(F.embedding(x % D, p["w"].T) @ p["w"]).square().sum()


def columns_after_rows(p, x):
    rows = F.linear(F.one_hot(x % D, D).double(), p["w"])
    return (torch.sin(rows) * F.embedding(x % D, p["w"].T)).sum()


def cell(p, x):
    h = x[0]
    for row in x:
        h = torch.tanh(F.linear(row, p["w"]) + F.linear(h, p["u"], p["b"]))
    return h.square().sum()


def shared_layers(p, x):
    for _ in range(3):
        x = x + torch.tanh(F.linear(F.layer_norm(x, (D,), p["s"], p["b"]), p["w"], p["b"]))
    return x.square().mean()


def a_matrix_and_its_transpose(p, x):
    return (torch.tanh(x @ p["w"]) @ p["w"].T).square().sum() + (x @ p["w"].mT).sin().sum()


def chunks(p, x):
    q, k, v = (F.linear(x, w, b) for w, b in zip(p["w"].chunk(3), p["b"].chunk(3), strict=True))
    return F.scaled_dot_product_attention(q, k, v).sin().sum()


def a_chunk_twice(p, x):
    a, b, _ = p["w"].chunk(3)
    return F.linear(torch.tanh(F.linear(x, a)), a).sum() + F.linear(x, b).sin().sum()


def overlapping_slices(p, x):
    return (F.linear(x, p["w"][:4]).sin().sum() + F.linear(x, p["w"][2:]).square().sum()) * p["w"][0, 0]


def every_other_row(p, x):
    return F.linear(x, p["w"][::2]).sin().sum() + F.linear(x, p["w"][1::2]).square().sum()


def a_flattened_one(p, x):
    return F.linear(x, p["w"]).sin().sum() + F.linear(x.flatten()[:15], p["w"].reshape(5, 15)).square().sum()


def convolutions(p, x):
    x = F.conv2d(x, p["w"], p["b"], padding=1)
    return F.conv2d(x.sin(), p["w"], p["b"], padding=1).square().sum()


def convolutions_of_two_sizes(p, x):
    x = F.conv2d(x, p["w"], p["b"], padding=1)
    return F.conv2d(x.sin(), p["w"], p["b"], stride=2).square().sum() + F.conv2d(x, p["w"]).sin().sum()


def a_kernel_and_its_transpose(p, x):
    x = F.conv2d(x, p["w"], padding=1)
    return F.conv2d(x.sin(), p["w"].transpose(0, 1), padding=1).square().sum()


def a_kernel_turned_in_space(p, x):
    x = F.conv2d(x, p["w"], padding=1)
    return F.conv2d(x.sin(), p["w"].transpose(2, 3), padding=1).square().sum()


def transposed_convolutions(p, x):
    x = F.conv_transpose2d(x, p["w"], padding=1)
    return F.conv_transpose2d(x.sin(), p["w"], padding=1).square().sum() + F.conv2d(x, p["w"]).sin().sum()


def images_through_one_kernel(p, x):
    images = torch.stack([x, x.cos(), x.flip(1)])
    return F.conv2d(F.conv2d(images, p["w"], p["b"], padding=1).sin(), p["w"], p["b"], padding=1).square().sum()


def columns_looked_up_twice(p, x):
    rows = F.linear(F.one_hot(x % D, D).double(), p["w"])
    return (torch.sin(rows) * F.embedding(x % D, p["w"].T) + F.embedding(x.flip(0) % D, p["w"].T).cos()).sum()


def used_and_copied(p, x):
    return F.linear(x, p["w"]).sin().sum() + (torch.cumsum(x, 0)[:, None] * p["w"]).cos().sum()


def a_use_in_vain(p, x):
    F.linear(x, p["w"].T).sum()
    return F.linear(torch.tanh(F.linear(x, p["w"])), p["w"]).sum()


def normalised_and_shared(p, x):
    w = F.normalize(p["w"], dim=1)
    return F.linear(torch.tanh(F.linear(x, w)), w).square().sum()


CASES = {
    tied: ({"w": (V, D)}, tokens(B, T)),
    tied_with_padding: ({"w": (V, D)}, tokens(B, T)),
    three_kinds: ({"w": (V, D)}, tokens(B, T)),
    table_by_columns: ({"w": (V, D)}, tokens(B, T)),
    columns_after_rows: ({"w": (V, D)}, tokens(B, T)),
    cell: ({"w": (D, D), "u": (D, D), "b": (D,)}, r(B, T, D)),
    shared_layers: ({"w": (D, D), "s": (D,), "b": (D,)}, r(B, T, D)),
    a_matrix_and_its_transpose: ({"w": (D, D)}, r(B, T, D)),
    chunks: ({"w": (3 * D, D), "b": (3 * D,)}, r(B, T, D)),
    a_chunk_twice: ({"w": (3 * D, D)}, r(B, T, D)),
    overlapping_slices: ({"w": (6, D)}, r(B, T, D)),
    every_other_row: ({"w": (6, D)}, r(B, T, D)),
    a_flattened_one: ({"w": (15, D)}, r(B, T, D)),
    convolutions: ({"w": (2, 2, 3, 3), "b": (2,)}, r(B, 2, 5, 6)),
    convolutions_of_two_sizes: ({"w": (2, 2, 3, 3), "b": (2,)}, r(B, 2, 7, 6)),
    a_kernel_and_its_transpose: ({"w": (2, 2, 3, 3)}, r(B, 2, 5, 6)),
    a_kernel_turned_in_space: ({"w": (2, 2, 3, 3)}, r(B, 2, 5, 6)),
    transposed_convolutions: ({"w": (2, 2, 3, 3)}, r(B, 2, 5, 6)),
    images_through_one_kernel: ({"w": (2, 2, 3, 3), "b": (2,)}, r(B, 2, 5, 6)),
    columns_looked_up_twice: ({"w": (V, D)}, tokens(B, T)),
    used_and_copied: ({"w": (4, 5)}, r(B, 4, 5)),
    a_use_in_vain: ({"w": (D, D)}, r(B, T, D)),
    normalised_and_shared: ({"w": (D, D)}, r(B, T, D)),
}


@dataclass(frozen=True)
class Nth(pegrad.BookKeeping):
    """Book-keeping by the n-th of all ways, in turns."""

    n: int = 0

    def choose(self, uses):
        found = candidates(uses, self.timings)
        return found[self.n % len(found)]

    choose_norm = choose


STRATEGIES = {"auto": "auto", "ghost": "ghost"} | {f"way {n}": Nth(n=n) for n in range(6)}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.__name__)
def test_several_uses_of_one_parameter(loss, strategy):
    shapes, batch = CASES[loss]
    params = {name: r(*shape) for name, shape in shapes.items()}
    grads = oracle.per_example_grads(loss, params, batch)
    norms = oracle.norms(grads)
    clip = float(norms.median())
    clipped = pegrad.clipped_grad(loss, clip_norm=clip, strategy=strategy)(params, batch)
    oracle.assert_close(clipped.norms, [norms])
    oracle.assert_close(clipped.grads, oracle.clipped_sum(grads, clip))


@pytest.mark.parametrize(
    ("loss", "one"),
    [(loss, one) for loss in (tied, three_kinds, cell, shared_layers, chunks, a_chunk_twice) for one in ("w",)],
)
def test_nothing_is_stacked_where_it_need_not_be(loss, one, monkeypatch):
    """Catches: every use of a leaf stacked, as if the leaf were small."""
    shapes, batch = CASES[loss]
    explanation = pegrad.explain(loss, {name: r(*shape) for name, shape in shapes.items()}, batch)
    uses = [use for use in explanation.uses if use.leaves == f"params['{one}']"]
    assert uses
    assert all(use.why in ("", f"{len(uses)} uses as one", "2 uses as one") for use in uses)
