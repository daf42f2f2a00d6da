"""Peers that work on modules: Opacus by hooks, by ghost clipping and by parameter, BackPACK by its batch norms.

Each function takes a task and a clip norm and returns a function without arguments, whose value is the clipped sum as
a pytree like the task's parameters. None of them is needed for anything else: what is not installed raises
`ModuleNotFoundError`, which the table shows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import native
from pegrad.trees import PyTree
from workloads import Task, cross_entropies


class CrossEntropy(nn.Module):
    """`cross_entropies` in the form that Opacus's ghost clipping wants, which sets `reduction` to `none`."""

    reduction = "sum"

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the losses, or their sum."""
        losses = cross_entropies(logits, labels)
        return losses if self.reduction == "none" else losses.sum()


def opacus_hooks(task: Task, clip_norm: float) -> Callable[[], PyTree]:
    """Opacus's default: hooks stack the gradients layer by layer, its optimizer clips and sums them."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    images, labels = task.batch
    module = GradSampleModule(task.module(), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(native.trained(module), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def clipped_sum() -> PyTree:
        cross_entropies(module(images), labels).sum().backward()
        optimizer.clip_and_accumulate()
        sums = [parameter.summed_grad for parameter in native.trained(module)]
        optimizer.zero_grad(set_to_none=True)
        return native.restored(task.params, iter(sums))

    return clipped_sum


def opacus_per_layer(task: Task, clip_norm: float) -> Callable[[], PyTree]:
    """Opacus's per-layer clipping, whose layers are single parameters: the bounds are equal and come to `clip_norm`."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPPerLayerOptimizer

    images, labels = task.batch
    module = GradSampleModule(task.module(), loss_reduction="sum")
    parameters = list(native.trained(module))
    optimizer = DPPerLayerOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=[clip_norm / len(parameters) ** 0.5] * len(parameters),
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def clipped_sum() -> PyTree:
        cross_entropies(module(images), labels).sum().backward()
        optimizer.clip_and_accumulate()
        sums = [parameter.summed_grad for parameter in parameters]
        optimizer.zero_grad(set_to_none=True)
        return native.restored(task.params, iter(sums))

    return clipped_sum


def opacus_adaptive_step(task: Task, clip_norm: float, noise_multiplier: float) -> Callable[[], None]:
    """A whole step of Opacus's adaptive clipping, in place: clip, noise that is not cryptographic, SGD, a new bound."""
    from opacus import GradSampleModule
    from opacus.optimizers import AdaClipDPOptimizer

    images, labels = task.batch
    module = GradSampleModule(task.module(), loss_reduction="sum")
    optimizer = AdaClipDPOptimizer(
        torch.optim.SGD(native.trained(module), lr=1e-3),
        noise_multiplier=noise_multiplier,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=1e6,
        min_clipbound=1e-6,
        unclipped_num_std=10.0,
        max_grad_norm=clip_norm,
        expected_batch_size=len(labels),
        loss_reduction="sum",
    )

    def step() -> None:
        cross_entropies(module(images), labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_step(
    task: Task, make: Callable[..., torch.optim.Optimizer], clip_norm: float, noise_multiplier: float, rate: float
) -> Callable[[], None]:
    """A whole step of Opacus by hooks, in place: clip, noise that is not cryptographic, and torch's own update."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    images, labels = task.batch
    module = GradSampleModule(task.module(), loss_reduction="sum")
    optimizer = DPOptimizer(
        make(list(native.trained(module)), lr=rate),
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip_norm,
        expected_batch_size=len(labels),
        loss_reduction="mean",
    )

    def step() -> None:
        cross_entropies(module(images), labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_ghost(task: Task, clip_norm: float) -> Callable[[], PyTree]:
    """Opacus's ghost clipping: norms in a first backward pass, the sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    images, labels = task.batch
    module = GradSampleModuleFastGradientClipping(task.module(), max_grad_norm=clip_norm, loss_reduction="sum")
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(native.trained(module), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    loss = DPLossFastGradientClipping(module, optimizer, CrossEntropy(), "sum")

    def clipped_sum() -> PyTree:
        loss(module(images), labels).backward()
        sums = [parameter.grad for parameter in native.trained(module)]
        optimizer.zero_grad(set_to_none=True)
        return native.restored(task.params, iter(sums))

    return clipped_sum


def backpack(task: Task, clip_norm: float) -> Callable[[], PyTree]:
    """BackPACK's `BatchL2Grad` for the norms, then a second backward pass of the weighted losses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    images, labels = task.batch
    module = extend(task.module())
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    parameters = list(module.parameters())

    def clipped_sum() -> PyTree:
        logits = module(images)
        with backpack(BatchL2Grad()):
            loss(logits, labels).backward(retain_graph=True)
        _check_supported(module)
        norms = torch.stack([parameter.batch_l2 for parameter in parameters]).sum(0).sqrt()
        weights = (clip_norm / norms).clamp(max=1)
        for parameter in parameters:
            del parameter.grad, parameter.batch_l2
        sums = torch.autograd.grad((weights * F.cross_entropy(logits, labels, reduction="none")).sum(), parameters)
        return native.restored(task.params, iter(sums))

    return clipped_sum


def _check_supported(module: nn.Module) -> None:
    """Raise an error if BackPACK has passed over a parameter."""
    layers = [layer for layer in module.modules() if any(True for _ in layer.parameters(recurse=False))]
    missing = {
        type(layer).__name__ for layer in layers if not hasattr(next(layer.parameters(recurse=False)), "batch_l2")
    }
    if missing:
        raise NotImplementedError(f"no batch norms for {', '.join(sorted(missing))}")
