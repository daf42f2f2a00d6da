"""PyTorch's table of modules (`module_db`): their parameters, the arguments of `forward` being the example."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing._internal.common_modules import module_db

from tables.uses import Use, are_dense, is_floating, rows, total, weights

SAMPLES = 12


def modules() -> dict[str, Any]:
    """Find the table's modules that exist in float64, by name."""
    found = [info for info in module_db if not info.is_lazy and torch.float64 in info.supported_dtypes("cpu")]
    return {info.formatted_name: info for info in found}


def uses(info: Any, samples: int = SAMPLES) -> Iterator[Use]:
    """Make uses of one module, in training and in evaluation if those differ, from samples all over its list."""
    for training in (True, False) if info.train_and_eval_differ else (True,):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
        for number in range(0, len(inputs), -(-len(inputs) // samples)):
            constructor, forward = inputs[number].constructor_input, inputs[number].forward_input
            leaves, spec = optree.tree_flatten((forward.args, forward.kwargs))
            if are_dense(leaves):
                module = info.module_cls(*constructor.args, **constructor.kwargs).double().train(training)
                yield _of_module(f"{info.formatted_name}[{number}]{'' if training else ' eval'}", module, leaves, spec)


def _of_module(name: str, module: nn.Module, leaves: list[Any], spec: Any) -> Use:
    """Make a use whose parameters are the module's, and a factor of all its inputs."""
    batch = {i: rows(leaf, strided=False) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    differentiable = [i for i, leaf in enumerate(leaves) if is_floating(leaf) and leaf.requires_grad]
    params = {key: p.detach().clone() for key, p in module.named_parameters()}

    def loss(p: Any, example: Any) -> Tensor:
        weight, found = example
        found = {i: t * p["scale"] if i in differentiable else t for i, t in found.items()}
        args, kwargs = optree.tree_unflatten(spec, [found.get(i, leaf) for i, leaf in enumerate(leaves)])
        return weight * total(functional_call(module, p["module"], args, kwargs))

    return Use(name, loss, {"module": params, "scale": torch.ones((), dtype=torch.float64)}, (weights(), batch))
