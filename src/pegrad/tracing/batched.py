"""Reach through `vmap`: find what lies in memory of a tensor, and run a function on the physical batch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pegrad.torch_internals import (
    hidden_axis,
    innermost_grad,
    innermost_vmap,
    is_batched,
    is_tracked,
    is_wrapped,
    level_of,
    lowered,
    unwrapped,
    wrapped,
)


def batched_at(tensor: Tensor, at: int) -> bool:
    """Tell whether a tensor has an axis that the `vmap` of that level hides."""
    return is_batched(tensor) and level_of(tensor) == at


def peeled(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the tensor below the innermost `vmap` that wraps it, and the axis of it that this hides."""
    return unwrapped(tensor), hidden_axis(tensor)


def physical(tensor: Tensor) -> Tensor:
    """Return the tensor that lies in memory, whatever transforms have wrapped it."""
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor


def batch_first(tensor: Tensor) -> Tensor:
    """Return what lies in memory of a tensor that is batched by the `vmap` that is running: `(B, ...)`."""
    below, axis = unwrapped(tensor), hidden_axis(tensor)
    return below.movedim(axis, 0) if axis else below


def is_constant(tensor: Tensor) -> bool:
    """Tell whether a value is known not to depend on what the innermost `torch.func.grad` differentiates by.

    Directly under `vmap` nothing is known. A tensor that requires a gradient of plain autograd's, such as a weight
    that the loss took from a module, is a constant.
    """
    at = innermost_grad()
    return at is not None and not (is_tracked(tensor) and level_of(tensor) == at and tensor.requires_grad)


def whole_rows(tensor: Tensor) -> bool:
    """Tell whether the examples of a tensor lie one after the other in memory, whatever transforms wrap it."""
    while is_wrapped(tensor):
        axis = hidden_axis(tensor)  # -1: not batched at this level
        tensor = unwrapped(tensor)
        if axis >= 0 and tensor.numel():
            steps = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
            if tensor.shape[axis] > 1 and 0 < tensor.stride(axis) <= sum(steps) - steps[axis]:  # 0: all the same
                return False
    return True


def on_physical_batch(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call a function on tensors as they lie in memory, the examples along their first axis.

    Args:
        function: takes one tensor `(B, ...)` for each of `tensors`, returns one tensor `(B, ...)`, or a tuple of
            them. Plain autograd records what it does.
        tensors: at least one of them batched; a shared one is expanded.

    Returns:
        The function's value, as the loss sees it: without the first axis.
    """
    at, batch = innermost_vmap()
    below = [batch_first(t) if batched_at(t, at) else t.expand(batch, *t.shape) for t in tensors]
    with lowered(at - 1 or None):
        result = function(*below)
    if isinstance(result, tuple):
        return tuple(wrapped(value, 0, at) for value in result)
    return wrapped(result, 0, at)
