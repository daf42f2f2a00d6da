"""Reach through `vmap`: tell batched tensors from shared ones, and run a function on the physical batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_batched(tensor: Tensor) -> bool:
    """Tell whether a tensor has, under the `vmap` that is running, an axis that the loss does not see."""
    # torch.func has no public way to ask; functorch's own code asks like this.
    return torch._C._functorch.is_batchedtensor(tensor)


def is_tracked(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of `torch.func.grad`'s or its like, running or over."""
    return torch._C._functorch.is_gradtrackingtensor(tensor)


def transformed() -> bool:
    """Tell whether a transform of torch.func is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def level() -> int | None:
    """Return how deep in transforms of torch.func this runs; None outside of all."""
    return torch._C._functorch.maybe_current_level()


def vmaps() -> list[tuple[int, str]]:
    """Return the batch size of each `vmap` that is running, and what it says of randomness, the outermost first."""
    functorch = torch._C._functorch
    maps = [
        functorch.CVmapInterpreterPtr(interpreter)
        for interpreter in functorch.get_interpreter_stack() or ()
        if interpreter.key() == functorch.TransformType.Vmap
    ]
    return [(mapped.batchSize(), mapped.randomness().name.lower()) for mapped in maps]


def differentiated() -> bool:
    """Tell whether a transform of torch.func other than `vmap` is running."""
    functorch = torch._C._functorch
    running = functorch.get_interpreter_stack() or ()
    return any(interpreter.key() != functorch.TransformType.Vmap for interpreter in running)


@contextmanager
def lowered(to: int | None) -> Iterator[None]:
    """Inside the block, the transforms of torch.func above a level do not run; None: none runs."""
    functorch = torch._C._functorch
    popped = []
    try:
        while functorch.maybe_current_level() != to:
            popped.append(functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while popped:
            functorch.push_dynamic_layer_stack(popped.pop())


@contextmanager
def entered(batch: int, randomness: str) -> Iterator[None]:
    """Inside the block, one more `vmap` runs: tensors that escaped from another of its level and batch are alive."""
    torch._C._functorch._vmap_increment_nesting(batch, randomness)
    try:
        yield
    finally:
        torch._C._functorch._vmap_decrement_nesting()


def batched_at(tensor: Tensor, at: int) -> bool:
    """Tell whether a tensor has an axis that the `vmap` of that level hides."""
    return is_batched(tensor) and torch._C._functorch.maybe_get_level(tensor) == at


def peeled(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the tensor below the innermost `vmap` that wraps it, and the axis of it that this hides."""
    return torch._C._functorch.get_unwrapped(tensor), torch._C._functorch.maybe_get_bdim(tensor)


def wrapped(tensor: Tensor, axis: int, at: int) -> Tensor:
    """Hide an axis, as the `vmap` of that level does."""
    return torch._C._functorch._add_batch_dim(tensor, axis, at)


@contextmanager
def changing_requires_grad() -> Iterator[None]:
    """Inside the block, a tensor may be made to require a gradient of the innermost `torch.func.grad`."""
    functorch = torch._C._functorch
    before = functorch.get_inplace_requires_grad_allowed()
    functorch.set_inplace_requires_grad_allowed(True)
    try:
        yield
    finally:
        functorch.set_inplace_requires_grad_allowed(before)


def physical(tensor: Tensor) -> Tensor:
    """Return the tensor that lies in memory, whatever transforms have wrapped it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def batch_first(tensor: Tensor) -> Tensor:
    """Return what lies in memory of a tensor that is batched by the `vmap` that is running: `(B, ...)`."""
    functorch = torch._C._functorch
    below, axis = functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor)
    return below.movedim(axis, 0) if axis else below


def is_constant(tensor: Tensor) -> bool:
    """Tell whether a value is known not to depend on what the innermost `torch.func.grad` differentiates by.

    Directly under `vmap` nothing is known. A tensor that requires a gradient of plain autograd's, such as a weight
    that the loss took from a module, is a constant.
    """
    functorch = torch._C._functorch
    interpreter = functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key() != functorch.TransformType.Grad:
        return False
    inside = functorch.is_gradtrackingtensor(tensor) and functorch.maybe_get_level(tensor) == interpreter.level()
    return not (inside and tensor.requires_grad)


def whole_rows(tensor: Tensor) -> bool:
    """Tell whether the examples of a tensor lie one after the other in memory, whatever transforms wrap it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        axis = functorch.maybe_get_bdim(tensor)  # -1: not batched at this level
        tensor = functorch.get_unwrapped(tensor)
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
    functorch = torch._C._functorch
    interpreter = functorch.peek_interpreter_stack()
    at, batch = interpreter.level(), functorch.CVmapInterpreterPtr(interpreter).batchSize()
    below = [batch_first(t) if batched_at(t, at) else t.expand(batch, *t.shape) for t in tensors]
    with lowered(at - 1 or None):
        result = function(*below)
    if isinstance(result, tuple):
        return tuple(wrapped(value, 0, at) for value in result)
    return wrapped(result, 0, at)
