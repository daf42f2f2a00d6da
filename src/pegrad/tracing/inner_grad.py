"""`torch.autograd.grad` inside a loss: run on the physical batch, where the examples' graphs lie beside each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pegrad.errors import StrategyError
from pegrad.torch_internals import is_batched, level, lowered, wrapped
from pegrad.tracing.batched import peeled, physical

SET_REQUIRES_GRAD = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


class Differentiates(BaseException):
    """The loss differentiates itself, so its graph must hold every parameter. No `except Exception` may catch it."""


def require_grad(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    """Do what `Tensor.requires_grad_` does to a batched tensor."""
    with lowered(None):
        physical(tensor).requires_grad_(requires_grad)
    return tensor


def inner_grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    is_grads_batched: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Do what `torch.autograd.grad` does, for each example.

    Raises:
        StrategyError: under a `vmap` of the loss's own, or by a tensor that the examples share, the graphs do not lie
            beside each other.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    given = (grad_outputs,) if grad_outputs is None or isinstance(grad_outputs, Tensor) else tuple(grad_outputs)
    given = given * len(outputs) if given == (None,) else given
    batched = [physical(t) for t in (*outputs, *inputs) if is_batched(t)]
    if is_grads_batched or len(batched) < len(outputs) + len(inputs) or any(t.dim() == 0 for t in batched):
        raise _refusal()
    at = level()
    assert at is not None
    if any(is_batched(peeled(t)[0]) for t in (*outputs, *inputs)):
        raise _refusal()
    with lowered(None):
        weights = [_beside(output, weight) for output, weight in zip(outputs, given, strict=True)]
        rows = batched[len(outputs) :]
        grads = torch.autograd.grad(batched[: len(outputs)], rows, weights, **options)
    axes = [peeled(t)[1] for t in inputs]
    return tuple(g if g is None else wrapped(g, axis, at) for g, axis in zip(grads, axes, strict=True))


def _beside(output: Tensor, weight: Tensor | None) -> Tensor:
    """Lay what an output's gradient starts from as the output lies."""
    whole, axis = peeled(output)
    if weight is None:
        if whole.dim() > 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        return torch.ones_like(whole)
    if not is_batched(weight):
        return weight.unsqueeze(axis).expand_as(whole)
    below, own = peeled(weight)
    return below.movedim(own, axis)


def _refusal() -> StrategyError:
    return StrategyError(
        "The loss calls torch.autograd.grad under a torch.func.vmap of its own, by a tensor that the examples share, "
        "or with is_grads_batched: use torch.func.grad for that gradient, or strategy='naive'"
    )
