"""Products with a parameter, matrices and others: decomposed into linear maps, one or several side by side."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pegrad.rules.blocks import blocks
from pegrad.rules.linear import linear
from pegrad.rules.site import Recorder, Rule

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def contract(trace: Recorder, name: str, x: Tensor, xs: str, w: Tensor, ws: str, out: str) -> Any:
    """Record `einsum("xs,ws->out", x, w)`, w being a parameter.

    An index of w that x has too and the output has not is summed over: a linear map. One that all three have makes
    maps side by side. One that w alone has is the linear map's output, or is summed over beforehand.

    Args:
        trace: the trace.
        name: what the operation is called.
        x: batched.
        xs: its indices, a letter each.
        w: the parameter.
        ws: its indices.
        out: the output's.
    """
    sizes = dict(zip(xs, x.shape, strict=True))
    repeated = any(len(set(labels)) != len(labels) for labels in (xs, ws, out))
    if repeated or any(sizes.get(i, n) != n for i, n in zip(ws, w.shape, strict=True)):
        return NotImplemented
    if not trace.is_parameter(w) or not trace.is_batched(x) or not w.numel() or not x.numel():
        return NotImplemented
    apart = [i for i in ws if i in xs and i in out]
    shared = [i for i in ws if i in xs and i not in out]
    own = [i for i in ws if i not in xs and i in out]
    positions = [i for i in xs if i not in ws and i in out]
    if apart and not shared and not own:  # a scale: maps of one number each, for which a copy is cheaper
        return NotImplemented
    rows = torch.einsum(f"{xs}->{''.join(apart + positions + shared)}", x)
    matrix = torch.einsum(f"{ws}->{''.join(apart + own + shared)}", w)
    side, kept = rows.shape[: len(apart)], rows.shape[len(apart) : len(apart) + len(positions)]
    made = matrix.shape[len(apart) : len(apart) + len(own)]
    if apart:
        rows, matrix = (t.reshape(prod(side), prod(n), -1) for t, n in ((rows, kept), (matrix, made)))
        y = blocks(trace, name, rows, matrix)
    else:
        y = linear(trace, rows.reshape(*kept, -1), matrix.reshape(prod(made), -1))
    return (
        y
        if y is NotImplemented
        else torch.einsum(f"{''.join(apart + positions + own)}->{out}", y.reshape(side + kept + made))
    )


def matmul(trace: Recorder, input: Tensor, other: Tensor) -> Any:
    """Rule of `torch.matmul`, `mm`, `mv`, `bmm` and `@`: a parameter on either side."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if trace.is_parameter(other):
        x, weight = input, other.mT if other.dim() > 1 else other
    elif not trace.is_parameter(input):
        return NotImplemented
    else:
        x, weight = other.mT if other.dim() > 1 else other, input
    if weight.dim() == 0 or x.dim() == 0:
        return NotImplemented
    if weight.dim() > 2:
        y = _batched_matmul(trace, x, weight)
    else:
        y = linear(trace, x, weight if weight.dim() == 2 else weight[None])
    if y is NotImplemented:
        return y
    if weight.dim() == 1:
        return y.squeeze(-1)
    return y.mT if x is not input and x.dim() > 1 else y


def _batched_matmul(trace: Recorder, x: Tensor, weight: Tensor) -> Any:
    """Record `x weightᵀ` for a weight of three axes or more, whose first ones are broadcast against those of `x`."""
    axes = max(x.dim(), weight.dim()) - 2
    batch, row = _LETTERS[:axes], "X" if x.dim() > 1 else ""
    xs = batch[axes - max(x.dim() - 2, 0) :] + row + "Z"
    ws = batch[axes - (weight.dim() - 2) :] + "YZ"
    for i in batch:
        if i in xs and i in ws and x.shape[xs.index(i)] != weight.shape[ws.index(i)]:
            if weight.shape[ws.index(i)] == 1:
                weight, ws = weight.squeeze(ws.index(i)), ws.replace(i, "")
            elif x.shape[xs.index(i)] == 1:
                x, xs = x.squeeze(xs.index(i)), xs.replace(i, "")
    return contract(trace, "matmul", x, xs, weight, ws, f"{batch}{row}Y")


def mm(trace: Recorder, input: Tensor, mat2: Tensor, **kwargs: Any) -> Any:
    """Rule of `torch.mm` and `torch.bmm`."""
    return NotImplemented if kwargs else matmul(trace, input, mat2)


def mv(trace: Recorder, input: Tensor, vec: Tensor, **kwargs: Any) -> Any:
    """Rule of `torch.mv`."""
    return NotImplemented if kwargs else matmul(trace, input, vec)


def addmm(
    trace: Recorder, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **kwargs: Any
) -> Any:
    """Rule of `torch.addmm` and `torch.baddbmm`."""
    if kwargs:
        return NotImplemented
    if beta == alpha == 1 and mat2.dim() == 2 and input.shape == mat2.shape[1:] and trace.is_parameter(input):
        return linear(trace, mat1, mat2.mT, input)
    y = matmul(trace, mat1, mat2)
    if y is NotImplemented:
        return y
    y = y if alpha == 1 else alpha * y
    if beta == 0:  # then `input` may be anything, NaN included
        return y
    input = trace.expand(input, y, "addmm") if trace.is_parameter(input) else input
    return y + (input if beta == 1 else beta * input)


def einsum(trace: Recorder, equation: str, *operands: Any) -> Any:
    """Rule of `torch.einsum` with two operands."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    read = _indices(equation, tensors) if any(trace.is_parameter(t) for t in tensors) else None
    if read is None:
        return NotImplemented
    (first, second), out = read
    a, b = tensors
    if trace.is_parameter(b):
        return contract(trace, "einsum", a, first, b, second, out)
    return contract(trace, "einsum", b, second, a, first, out)


def _indices(equation: str, tensors: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """Read an equation of two operands: the letters of each, and of the output; an ellipsis turned into letters."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not len(labels) == len(tensors) == 2:
        return None
    if not arrow:
        once = sorted(i for i in set(inputs) - {",", "."} if inputs.count(i) == 1)
        out = "".join(["..." if "..." in inputs else "", *once])
    unnamed = [t.dim() - len(label.replace("...", "")) for t, label in zip(tensors, labels, strict=True)]
    if any(n < 0 or (n > 0 and "..." not in label) for n, label in zip(unnamed, labels, strict=True)):
        return None
    dots = "".join(i for i in _LETTERS if i not in equation)[: max(unnamed)]
    labels = [label.replace("...", dots[len(dots) - n :]) for label, n in zip(labels, unnamed, strict=True)]
    out = out.replace("...", dots)
    return (labels, out) if set(out) <= set("".join(labels)) else None


def tensordot(trace: Recorder, a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Any:
    """Rule of `torch.tensordot`."""
    if out is not None or isinstance(dims, Tensor) or not any(trace.is_parameter(t) for t in (a, b)):
        return NotImplemented
    if isinstance(dims, int):
        dims = range(a.dim() - dims, a.dim()), range(dims)
    left, right = ([axes] if isinstance(axes, int) else list(axes) for axes in dims)
    first, second = list(_LETTERS[: a.dim()]), list(_LETTERS[a.dim() : a.dim() + b.dim()])
    for i, j in zip(left, right, strict=True):
        second[j] = first[i]
    kept = "".join(i for i in first + second if (i in first) != (i in second))
    if trace.is_parameter(b):
        return contract(trace, "tensordot", a, "".join(first), b, "".join(second), kept)
    return contract(trace, "tensordot", b, "".join(second), a, "".join(first), kept)


RULES: dict[Any, Rule] = {
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.mm: mm,
    torch.Tensor.mm: mm,
    torch.bmm: mm,
    torch.Tensor.bmm: mm,
    torch.mv: mv,
    torch.Tensor.mv: mv,
    torch.Tensor.__rmatmul__: lambda trace, self, other: matmul(trace, other, self),
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.baddbmm: lambda trace, input, batch1, batch2, **kwargs: addmm(trace, input, batch1, batch2, **kwargs),
    torch.Tensor.baddbmm: lambda trace, input, batch1, batch2, **kwargs: addmm(trace, input, batch1, batch2, **kwargs),
    torch.einsum: einsum,
    torch.functional.einsum: einsum,
    torch.tensordot: tensordot,
}
