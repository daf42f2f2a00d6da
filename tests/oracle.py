"""The one oracle: a loop of `torch.autograd.grad` over the examples, in float64, with nothing of pegrad in it."""

from typing import Any

import optree
import torch
from torch import Tensor

NAMESPACE = "pegrad"


def double(tree: Any) -> Any:
    """Turn every floating-point leaf to float64."""
    return optree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tree, namespace=NAMESPACE)


def rows(batch: Any) -> list[Any]:
    """Split a batch into its examples."""
    size = optree.tree_leaves(batch, namespace=NAMESPACE)[0].shape[0]
    return [optree.tree_map(lambda t, b=b: t[b], batch, namespace=NAMESPACE) for b in range(size)]


def per_example_grads(loss: Any, params: Any, batch: Any) -> list[Tensor]:
    """One tensor `(B, *leaf.shape)` for each leaf of `params`, float64."""
    leaves, spec = optree.tree_flatten(double(params), namespace=NAMESPACE)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    stacked = []
    for example in rows(double(batch)):
        result = loss(optree.tree_unflatten(spec, leaves), example)
        value = result[0] if isinstance(result, tuple) else result
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        stacked.append(grads)
    return [torch.stack(column) for column in zip(*stacked, strict=True)]


def norms(grads: list[Tensor]) -> Tensor:
    """Norm of each row over all leaves."""
    return torch.stack([g.reshape(g.shape[0], -1).square().sum(1) for g in grads]).sum(0).sqrt()


def clipped_sum(grads: list[Tensor], clip_norm: float) -> list[Tensor]:
    """Sum of the rows, each scaled down to norm `clip_norm` where it is longer."""
    scale = (clip_norm / norms(grads)).clamp(max=1)
    return [torch.einsum("b,b...->...", scale, g) for g in grads]


def assert_close(actual: Any, expected: list[Tensor], relative: float = 1e-10) -> None:
    """Compare leaf by leaf; the error is relative to the leaf's largest entry."""
    leaves = optree.tree_leaves(actual, namespace=NAMESPACE)
    assert len(leaves) == len(expected)
    for got, want in zip(leaves, expected, strict=True):
        assert got.shape == want.shape
        if not want.numel():
            continue
        error = (got - want).abs().max()
        assert error <= relative * want.abs().max().clamp(min=1e-12), f"relative error {error / want.abs().max()}"


def group_norms(grads: list[Tensor], of: list[int]) -> Tensor:
    """Norm of each row over the leaves of each group: `(G, B)`."""
    groups = [[grad for grad, group in zip(grads, of, strict=True) if group == which] for which in range(max(of) + 1)]
    return torch.stack([norms(members) for members in groups])


def weighted_sum(grads: list[Tensor], of: list[int], weight: Any) -> list[Tensor]:
    """Sum of the rows, each leaf's weighed by a function of the group's index and its norms `(B,)`."""
    weights = [weight(group, row) for group, row in enumerate(group_norms(grads, of))]
    return [torch.einsum("b,b...->...", weights[group], g) for group, g in zip(of, grads, strict=True)]
