"""Arithmetic that a guarantee rests on: which dtype, which order, and nothing that lowers either behind our back.

What the rounding of it amounts to, and why, is in `docs/rounding.md`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from itertools import repeat

import torch
from torch import Tensor

BLOCK = 1 << 21
"""Numbers that a computation in parts holds at a time: what bounds its memory, and keeps it in the cache."""

FLOAT32_ROWS = 256
"""Up to so many rows, a sum over a batch of float32 gradients is a float32; over more rows it is a float64.

One example moves a sum of B clipped gradients by at most the bound of one. The last place of a float32 sum is worth
up to B · 2^-24 of that bound: 1.5e-5 for 256 rows, 6% for a million.
"""

_SEGMENT = 1 << 9  # `vector_norm` adds naively: over this many numbers it is off by less than 1e-6
_PRODUCT_SEGMENT = 1 << 11  # so do products, a call for each: over this many they are off by less than 4e-6
FEW = 32  # rows that a float32 contraction adds before it starts anew, for the same reason
_TINY = 2.0**-63  # the square of less than this is lost in float32


def accumulator(dtype: torch.dtype, rows: int = 1) -> torch.dtype:
    """Return the dtype in which a sum over so many rows of that dtype is kept: at least float32."""
    if rows > FLOAT32_ROWS:
        return torch.float64
    return _at_least_float32(dtype)


@cache
def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def widen(t: Tensor) -> Tensor:
    """Turn half precision to float32; integers and wider numbers stay as they are."""
    return t.to(accumulator(t.dtype)) if t.is_floating_point() else t


def squared_norms(rows: Tensor) -> Tensor:
    """Sum of squares of each row, `(B, ...)` to `(B,)`, in float64.

    It is infinite where a number's square overflows, and right to 1e-6 where the norm is above 1e-16 times the root of
    the row's length.
    """
    return _squares(rows)


def norm_bounds(rows: Tensor) -> Tensor:
    """Bound each row's norm from above, `(B, ...)` to `(B,)`, in float64, numbers whose squares vanish included."""
    numbers = rows[0].numel() if len(rows) else 0
    return _squares(rows).sqrt() * (1 + 1e-4) + _TINY * numbers**0.5


def _squares(rows: Tensor) -> Tensor:
    flat = widen(rows).reshape(rows.shape[0], -1)  # by way of norms, which need no second array of that size
    if flat.shape[1] <= _SEGMENT:
        return torch.linalg.vector_norm(flat, dim=1).double().square()
    whole = flat.shape[1] // _SEGMENT * _SEGMENT
    squares = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, _SEGMENT)), dim=2).double().square().sum(1)
    return squares + torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square()


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, `(A, ...)` and `(B, ...)` to `(A, B)`, in float64.

    Products of float32 rows are added up few numbers at a time.
    """
    dtype = torch.promote_types(accumulator(a.dtype), accumulator(b.dtype))
    a, b = (t.reshape(t.shape[0], -1).to(dtype) for t in (a, b))
    if dtype == torch.float64:
        return a @ b.T
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(_PRODUCT_SEGMENT, 1), b.split(_PRODUCT_SEGMENT, 1), strict=True):
        total = total + x @ y.T
    return total


def contract(weights: Tensor, rows: Tensor, bad: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum rows by weights.

    Args:
        weights: `(B,)`.
        rows: `(B, ...)`.
        bad: `(B,)`, boolean: rows that are left out altogether, whatever they hold; None: no such row.
        dtype: of the sum, at least that of `rows`. In float64 every product is; float32 products are added a few rows
            at a time.

    Returns:
        A tensor of the shape of a row.
    """
    step = max(1, BLOCK // max(1, rows.shape[1:].numel())) if dtype == torch.float64 else FEW
    total: Tensor | None = None
    for some, part, out in zip(
        weights.to(dtype).split(step), rows.split(step), repeat(None) if bad is None else bad.split(step), strict=False
    ):
        part = part.reshape(part.shape[0], -1).to(dtype)
        summed = some @ (part if out is None else part.masked_fill(out[:, None], 0))
        total = summed if total is None else total + summed
    assert total is not None, "a batch has at least one row"
    return total.reshape(rows.shape[1:])


def by_example(t: Tensor, weights: Tensor) -> Tensor:
    """Multiply a tensor with one or several rows an example by the examples' weights, `(B,)`."""
    return t * _spread(weights.to(t.dtype), t)


def zero_rows(t: Tensor, rows: Tensor | None) -> Tensor:
    """Set the marked examples' rows to zero, of a tensor with one or several rows an example; integers stay."""
    if rows is None or not t.is_floating_point():
        return t
    return t.masked_fill(_spread(rows, t), 0)


def take_rows(t: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Take the examples at some indices, of a tensor with one or several rows an example."""
    several = t.shape[0] // batch
    if several == 1:
        return t[rows]
    return t.unflatten(0, (batch, several))[rows].flatten(0, 1)


def _spread(values: Tensor, t: Tensor) -> Tensor:
    several = t.shape[0] // values.shape[0]
    values = values if several == 1 else values.repeat_interleave(several)
    return values.reshape(-1, *[1] * (t.dim() - 1))


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """Run a block of our own arithmetic in the dtypes that it names, whatever the caller has set for the loss."""
    with without_autocast(device), full_precision():
        yield


def without_autocast(device: torch.device) -> torch.autocast:
    """Run a block in the dtypes that it names."""
    return torch.autocast(device.type, enabled=False)


def full_precision() -> AbstractContextManager[None]:
    """Run a block with float32 products that are float32: no TF32, no bfloat16 in their place."""
    lowered = torch.get_float32_matmul_precision() != "highest" or _tf32_in_cudnn()
    return _raised_precision() if lowered else nullcontext()


@contextmanager
def _raised_precision() -> Iterator[None]:
    with ExitStack() as settings:
        settings.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        cudnn = torch.backends.cudnn
        if _tf32_in_cudnn():
            settings.enter_context(cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, False, False))
        yield


def _tf32_in_cudnn() -> bool:
    return torch.cuda.is_initialized() and torch.backends.cudnn.allow_tf32
