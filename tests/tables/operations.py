"""PyTorch's table of operations (`op_db`): each floating argument in turn the parameter, the others the example."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import optree
import torch
from torch import Tensor
from torch.testing._internal import common_methods_invocations as table

from tables.uses import Use, are_dense, is_floating, rows, total, weights

SAMPLES = 4
UNDEFINED = ("empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "resize_as_")
"""Operations whose value is whatever the memory held."""
CONTIGUOUS = ("native_group_norm",)
"""Operations that the plain loop gets wrong on strided rows: this one reads a strided weight as if contiguous."""


def operations() -> dict[str, Any]:
    """Find the table's operations that have a gradient in float64 on a CPU, by name."""
    return {
        op.formatted_name: op
        for op in table.op_db
        if op.supports_autograd and op.supports_dtype(torch.float64, "cpu") and op.name not in UNDEFINED
    }


def uses(op: Any, samples: int = SAMPLES) -> Iterator[Use]:
    """Make the uses of one operation, from the first few of its samples."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for number, sample in enumerate(islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), samples)):
        leaves, spec = optree.tree_flatten((sample.input, sample.args, sample.kwargs))
        if are_dense(leaves):
            strided = number % 2 == 1 and op.name not in CONTIGUOUS
            yield from _of_sample(f"{op.formatted_name}[{number}]", _call(op, sample, leaves, spec), leaves, strided)


def _call(op: Any, sample: Any, leaves: list[Any], spec: Any) -> Callable[[dict[int, Tensor]], Any]:
    """Make a function of a sample's tensors, by number, that runs the operation; random ones draw anew each time."""

    def call(found: dict[int, Tensor]) -> Any:
        input, args, kwargs = optree.tree_unflatten(spec, [found.get(i, leaf) for i, leaf in enumerate(leaves)])
        with mock.patch.object(table, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs)):
            return sample.output_process_fn_grad(op(input, *args, **kwargs))

    return call


def _of_sample(name: str, call: Callable, leaves: list[Any], strided: bool) -> Iterator[Use]:
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    batch = {i: rows(t, strided=strided) for i, t in tensors.items()}
    for at in (i for i, t in tensors.items() if is_floating(t)):

        def loss(p: Tensor, example: Any, at: int = at) -> Tensor:
            weight, found = example
            return weight * total(call({**found, at: p}))

        others = {i: t for i, t in batch.items() if i != at}
        yield Use(f"{name} argument {at}", loss, tensors[at].detach().double(), (weights(), others))

    differentiable = [i for i, t in tensors.items() if is_floating(t) and t.requires_grad]

    def scaled(p: Tensor, example: Any) -> Tensor:
        weight, found = example
        return weight * total(call({i: t * p if i in differentiable else t for i, t in found.items()}))

    if differentiable:
        yield Use(f"{name} activations", scaled, torch.ones((), dtype=torch.float64), (weights(), batch))
