"""A `vmap` of the loss's own, over images of an example: a call under it is a call below it on one more axis."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad import trees
from pegrad.torch_internals import level, lowered, wrapped
from pegrad.tracing.batched import batched_at, peeled

Wide = Callable[[Any], bool]
"""Tells whether an argument has the axis, in front of all others."""
Widened = Callable[..., Any]
"""`(wide, *args, **kwargs)` to the function's value on all images, their axis in front; or `NotImplemented`."""


def on_all_images(widened: Widened, mode: AbstractContextManager, args: Any, kwargs: Any) -> Any:
    """Run a call under the innermost `vmap` below it.

    Args:
        widened: the function, for arguments that have one more axis.
        mode: what sees the calls that it makes.
        args: the arguments of the call.
        kwargs: its keyword arguments.

    Returns:
        The call's value under the `vmap`; or `NotImplemented`.
    """
    at = level()
    assert at is not None
    moved: dict[int, Tensor] = {}

    def down(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or not batched_at(argument, at):
            return argument
        below, axis = peeled(argument)
        below = below.movedim(axis, 0)
        moved[id(below)] = below  # kept, so that its id stays its own
        return below

    with lowered(at - 1):
        args, kwargs = trees.map(down, args), trees.map(down, kwargs)
        with mode:
            value = widened(lambda argument: id(argument) in moved, *args, **kwargs)
    return wrapped(value, 0, at) if isinstance(value, Tensor) and moved else value


def _in_front(function: Callable[..., Tensor]) -> Widened:
    """Widen a function that takes any axes in front of its input's."""

    def widened(wide: Wide, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(wide(argument) for argument in (*args, *kwargs.values())):
            return NotImplemented
        return function(input, *args, **kwargs)

    return widened


def _of_batches(function: Callable[..., Tensor], axes: int | None = None) -> Widened:
    """Widen a function whose input has an axis of images already, unless it has but so many axes."""

    def widened(wide: Wide, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(wide(argument) for argument in (*args, *kwargs.values())):
            return NotImplemented
        if not wide(input) or input.dim() - 1 == axes:
            return function(input, *args, **kwargs)
        return function(input.flatten(0, 1), *args, **kwargs).unflatten(0, input.shape[:2])

    return widened


def _instance_norm(wide: Wide, input: Tensor, running_mean: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    if running_mean is not None:  # which changes
        return NotImplemented
    return _of_batches(F.instance_norm)(wide, input, None, *args, **kwargs)


def _matmul(wide: Wide, input: Tensor, other: Tensor) -> Any:
    if not wide(input) and not wide(other):
        return input @ other
    x, weight = (input, other) if wide(input) else (other, input)
    if wide(weight) or weight.dim() > 2:
        return NotImplemented
    if x is other and x.dim() == 2:  # vectors, that are to be multiplied from the left
        return x @ (weight.mT if weight.dim() == 2 else weight)
    return input @ other


def _einsum(wide: Wide, equation: str, *operands: Any) -> Any:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation:
        return NotImplemented
    inputs, out = equation.split("->")
    axis = next(letter for letter in "zyxwvutsrqponmlkjihgfedcbaZ" if letter not in equation)
    labels = [axis * wide(t) + label for t, label in zip(tensors, inputs.split(","), strict=True)]
    return torch.einsum(f"{','.join(labels)}->{axis * any(map(wide, tensors))}{out}", *tensors)


def _attention(
    wide: Wide,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    if dropout_p > 0:  # what `vmap` is told of randomness decides
        return NotImplemented
    axes = max(t.dim() + (not wide(t)) for t in (query, key, value, attn_mask) if t is not None)

    def aligned(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], *[1] * (axes - t.dim()), *t.shape[1:]) if wide(t) else t

    mask = None if attn_mask is None else aligned(attn_mask)
    q, k, v = aligned(query), aligned(key), aligned(value)
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, **kwargs)


WIDENED: dict[Any, Widened] = {
    F.linear: _in_front(F.linear),
    F.embedding: _in_front(F.embedding),
    F.layer_norm: _in_front(F.layer_norm),
    F.rms_norm: _in_front(F.rms_norm),
    torch.rms_norm: _in_front(torch.rms_norm),
    F.group_norm: _of_batches(F.group_norm),
    F.instance_norm: _instance_norm,
    **{f: _of_batches(f, 2) for f in (F.conv1d, F.conv_transpose1d)},
    **{f: _of_batches(f, 3) for f in (F.conv2d, F.conv_transpose2d)},
    **{f: _of_batches(f, 4) for f in (F.conv3d, F.conv_transpose3d)},
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.mv, Tensor.mv), _matmul),
    Tensor.__rmatmul__: lambda wide, input, other: _matmul(wide, other, input),
    torch.einsum: _einsum,
    torch.functional.einsum: _einsum,
    F.scaled_dot_product_attention: _attention,
}
"""For each function that has one, what to call below the `vmap`."""
