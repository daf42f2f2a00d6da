"""The convolution as PyTorch differentiates and vmaps it, with our own rule for per-example gradients.

A convolution is bilinear in input and weight, so it consists of three linear maps: the value, the input gradient
and the weight gradient. The derivatives of each are the two others; the three `autograd.Function`s below are
therefore closed under differentiation, to any order, in both modes. A transposed convolution *is* an input
gradient and needs nothing of its own.

Under `vmap(grad(loss))` the weight is shared by the examples, the input is not. Value and input gradient fold the
vmapped axis into the batch axis and run once; the weight gradient calls a kernel that returns one gradient for
each example. That is the rule of Rochette, Manoel & Tramel 2019 ("crb").
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pegrad.rules.conv.calls import READERS, Convolution
from pegrad.rules.conv.cost import choose
from pegrad.rules.conv.geometry import Geometry
from pegrad.rules.conv.kernels import KERNELS

Dims = tuple[int | None, ...]


def replacements(kernel: str | None = None) -> dict[Callable, Callable]:
    """Return, for each of PyTorch's convolution functions, the one that follows our rule.

    Args:
        kernel: name of the weight gradient kernel to use throughout; None picks the cheapest for each call.

    Returns:
        A table from function to function; key and value take the same arguments and return the same values.
    """

    def replacement(function: Callable[..., Tensor], read: Callable[..., Convolution]) -> Callable[..., Tensor]:
        def convolve(*args: Any, **kwargs: Any) -> Tensor:
            convolution = read(*args, **kwargs)
            return _apply(convolution, kernel) if convolution.numel() else function(*args, **kwargs)

        return convolve

    return {function: replacement(function, read) for function, read in READERS.items()}


def _apply(convolution: Convolution, kernel: str | None) -> Tensor:
    convolution = convolution.autocast()
    call = Call(convolution.geometry, convolution.size, kernel)
    x = convolution.input[None] if convolution.unbatched else convolution.input
    y = (InputGradient if convolution.transposed else Value).apply(x, convolution.weight, call)
    y = y if convolution.bias is None else y + convolution.offset(convolution.bias)
    return y.squeeze(0) if convolution.unbatched else y  # indexing's backward would fill zeros and copy


@dataclass(frozen=True)
class Call:
    """What one convolution call is, apart from its tensors."""

    geometry: Geometry
    size: tuple[int, ...]  # spatial size of the input (of the output, where the convolution is transposed)
    kernel: str | None  # name of the weight gradient kernel; None: the cheapest


class _Bilinear(torch.autograd.Function):
    """What the three maps share: two tensors, saved for both modes of differentiation."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Call], output: Tensor) -> None:
        left, right, ctx.call = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)


class Value(_Bilinear):
    """`(x, w) -> y`: `(N, C, *size)`, `(D, C/groups, *kernel)` to `(N, D, *output)`."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, call: Call) -> Tensor:
        return call.geometry.forward(x, w)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        x_bar = InputGradient.apply(y_bar, w, ctx.call) if ctx.needs_input_grad[0] else None
        w_bar = WeightGradient.apply(x, y_bar, ctx.call) if ctx.needs_input_grad[1] else None
        return x_bar, w_bar, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor | None, w_dot: Tensor | None, _: None) -> Tensor:
        return _product_rule(Value, ctx, x_dot, w_dot)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, x: Tensor, w: Tensor, call: Call) -> tuple[Tensor, int]:
        return _fold(Value, info, in_dims, x, w, call)


class InputGradient(_Bilinear):
    """`(g, w) -> x`: `(N, D, *output)`, `(D, C/groups, *kernel)` to `(N, C, *size)`."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, call: Call) -> Tensor:
        return call.geometry.input_gradient(g, w, call.size)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, w = ctx.saved_tensors
        g_bar = Value.apply(x_bar, w, ctx.call) if ctx.needs_input_grad[0] else None
        w_bar = WeightGradient.apply(x_bar, g, ctx.call) if ctx.needs_input_grad[1] else None
        return g_bar, w_bar, None

    @staticmethod
    def jvp(ctx: Any, g_dot: Tensor | None, w_dot: Tensor | None, _: None) -> Tensor:
        return _product_rule(InputGradient, ctx, g_dot, w_dot)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, g: Tensor, w: Tensor, call: Call) -> tuple[Tensor, int]:
        return _fold(InputGradient, info, in_dims, g, w, call)


class WeightGradient(_Bilinear):
    """`(x, g) -> w`, summed over `N`; vmapped, one gradient for each example."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, call: Call) -> Tensor:
        return call.geometry.weight_gradient(x, g)

    @staticmethod
    def backward(ctx: Any, w_bar: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, g = ctx.saved_tensors
        x_bar = InputGradient.apply(g, w_bar, ctx.call) if ctx.needs_input_grad[0] else None
        g_bar = Value.apply(x, w_bar, ctx.call) if ctx.needs_input_grad[1] else None
        return x_bar, g_bar, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor | None, g_dot: Tensor | None, _: None) -> Tensor:
        return _product_rule(WeightGradient, ctx, x_dot, g_dot)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, x: Tensor, g: Tensor, call: Call) -> tuple[Tensor, int]:
        x, g = (_batch_first(t, dim, info.batch_size) for t, dim in zip((x, g), in_dims, strict=False))
        n = x.shape[1]
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        name = call.kernel or choose(x, g, call.geometry, n)
        return KERNELS[name](x, g, call.geometry, n), 0


def _product_rule(function: type, ctx: Any, left_dot: Tensor | None, right_dot: Tensor | None) -> Tensor:
    left, right = ctx.saved_tensors
    terms = [] if left_dot is None else [function.apply(left_dot, right, ctx.call)]  # type: ignore[attr-defined]
    terms += [] if right_dot is None else [function.apply(left, right_dot, ctx.call)]  # type: ignore[attr-defined]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _fold(function: type, info: Any, in_dims: Dims, x: Tensor, w: Tensor, call: Call) -> tuple[Tensor, int]:
    """Fold the vmapped axis of `x` into its batch axis; where `w` has one too, into the channels and the groups."""
    batch = info.batch_size
    x = _batch_first(x, in_dims[0], batch)
    n = x.shape[1]
    if in_dims[1] is None:
        y = function.apply(x.flatten(0, 1), w, call)  # type: ignore[attr-defined]
        return y.unflatten(0, (batch, n)), 0
    apart = replace(call, geometry=call.geometry._replace(groups=batch * call.geometry.groups))
    w = w.movedim(in_dims[1], 0).flatten(0, 1)
    y = function.apply(x.movedim(1, 0).flatten(1, 2), w, apart)  # type: ignore[attr-defined]
    return y.unflatten(1, (batch, -1)).movedim(1, 0), 0


def _batch_first(t: Tensor, dim: int | None, batch: int) -> Tensor:
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
