"""PyTorch's convolution functions, argument by argument, put in terms of our own rule."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.conv.function import Call, InputGradient, Value
from pegrad.rules.conv.geometry import Geometry

Ints = int | Sequence[int]


def replacements(kernel: str | None = None) -> dict[Callable, Callable]:
    """Return, for each of PyTorch's convolution functions, the one that follows our rule.

    Args:
        kernel: name of the weight gradient kernel to use throughout; None picks the cheapest for each call.

    Returns:
        A table from function to function; key and value take the same arguments and return the same values.
    """

    def convolution(nd: int) -> Callable[..., Tensor]:
        def conv(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Ints = 1,
            padding: str | Ints = 0,
            dilation: Ints = 1,
            groups: int = 1,
        ) -> Tensor:
            x = input if input.dim() == nd + 2 else input[None]
            stride, dilation = _each(stride, nd), _each(dilation, nd)
            size = tuple(weight.shape[2:])
            x, pad = resolve_padding(x, padding, size, stride, dilation)
            geometry = Geometry(size, stride, pad, dilation, groups)
            y = Value.apply(x, weight, Call(geometry, tuple(x.shape[2:]), kernel))
            return _finish(y, bias, unbatched=input.dim() != nd + 2)

        return conv

    def transposed(nd: int) -> Callable[..., Tensor]:
        def conv_transpose(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Ints = 1,
            padding: Ints = 0,
            output_padding: Ints = 0,
            groups: int = 1,
            dilation: Ints = 1,
        ) -> Tensor:
            g = input if input.dim() == nd + 2 else input[None]
            geometry = Geometry(
                tuple(weight.shape[2:]), _each(stride, nd), _each(padding, nd), _each(dilation, nd), groups
            )
            size = geometry.transposed_size(g.shape[2:], _each(output_padding, nd))
            # With an output padding of a stride or more, `size` has room for outputs that `g` lacks: they are zero.
            lacking = [o - n for o, n in zip(geometry.output_size(size), g.shape[2:], strict=True)]
            g = F.pad(g, [width for n in reversed(lacking) for width in (0, n)]) if any(lacking) else g
            x = InputGradient.apply(g, weight, Call(geometry, size, kernel))
            return _finish(x, bias, unbatched=input.dim() != nd + 2)

        return conv_transpose

    forward = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
    backward = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
    return {f: convolution(nd) for f, nd in forward.items()} | {f: transposed(nd) for f, nd in backward.items()}


def resolve_padding(
    x: Tensor, padding: str | Ints, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Turn 'same' and 'valid' into numbers; what 'same' adds on one side only is padded here and now.

    Args:
        x: input, `(N, C, *spatial)`.
        padding: one number, one for each axis, 'same' or 'valid'.
        size: kernel size for each axis.
        stride: stride for each axis; 1 where padding is 'same'.
        dilation: dilation for each axis.

    Returns:
        The input, and the padding left to the convolution itself: the same width on both sides of each axis.

    Raises:
        RuntimeError: 'same' with a stride other than 1, as PyTorch's own function.
    """
    if padding == "valid":
        return x, (0,) * len(size)
    if padding != "same":
        return x, _each(padding, len(size))  # type: ignore[arg-type]  # a string other than these two is none of ours
    if any(s != 1 for s in stride):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    totals = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [width for total in reversed(totals) for width in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _each(value: Ints, nd: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * nd if len(values) == 1 else values


def _finish(y: Tensor, bias: Tensor | None, unbatched: bool) -> Tensor:
    if bias is not None:
        y = y + bias.reshape(-1, *[1] * (y.dim() - 2))
    return y[0] if unbatched else y
