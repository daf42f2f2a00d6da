"""Whether a graph gives what the call gives, but for rounding."""

from collections.abc import Iterable
from math import inf
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad.checking.compare import FURTHER, TOLERANCE

_SHARE = 1e-2  # a tensor that is next to nothing is judged by this share of its largest neighbour
_MOST = 2**-5  # of a tensor, that kinks and ties may account for
_LAST_PLACES = 2  # what is rounded away where a little is added to much


def worst_difference(given: Any, wanted: Any, start: Any = None, others: Iterable[Any] = ()) -> float:
    """Measure how far a value is from what it should be, over what passes for rounding: above 1 is too far.

    A floating-point tensor is measured by the norm of the difference, relative to its own; where it started from
    something, to the norm of what was added to it, for new parameters differ from the old ones by little. What is next
    to nothing is judged by its neighbours, the other tensors of the same field of the value. Other tensors must be
    equal.

    Args:
        given: what came out.
        wanted: what should have.
        start: of the same structure as the value, or a part of it, field by field: where a tensor started from, or
            None.
        others: values that rounding alone could have made of what is wanted; a tensor may be as far away as those are,
            and a few times further.
    """
    if not isinstance(wanted, tuple):
        given, wanted, start, others = (given,), (wanted,), (start,), ((other,) for other in others)
    moved = [[0.0] * len(trees.leaves(field)) for field in wanted]
    for other in others:
        moved = [_furthest(*fields) for fields in zip(moved, other, wanted, strict=True)]
    fields = zip(given, wanted, start or (None,) * len(wanted), moved, strict=True)
    return max((_worst(*field) for field in fields), default=0.0)


def _furthest(moved: list[float], other: Any, wanted: Any) -> list[float]:
    """Return the greater distances: those found before, or another value's, tensor by tensor."""
    columns = zip(moved, trees.leaves(other), trees.leaves(wanted), strict=True)
    return [max(before, _distance(tensor, expected)) for before, tensor, expected in columns]


def _worst(given: Any, wanted: Any, start: Any, moved: list[float]) -> float:
    tensors, expected = trees.leaves(given), trees.leaves(wanted)
    origins = trees.leaves(start) if start is not None else [None] * len(expected)
    ways = [_way(tensor, origin) for tensor, origin in zip(expected, origins, strict=True)]
    scale = max((float(way.norm()) for way in ways if way is not None), default=0.0)
    columns = zip(tensors, expected, origins, ways, moved, strict=True)
    return max((_far(*column, scale) for column in columns), default=0.0)


def _far(given: Any, wanted: Any, origin: Tensor | None, way: Tensor | None, moved: float, scale: float) -> float:
    if not isinstance(wanted, Tensor):
        return 0.0 if given == wanted else inf
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return inf
    if way is None or not bool(given.isfinite().eq(wanted.isfinite()).all()):
        return 0.0 if bool(_same(given, wanted).all()) else inf
    error = _distance(given, wanted)
    size = max(float(way.norm()), _SHARE * scale)
    allowed = TOLERANCE[wanted.dtype] * size + min(FURTHER * moved, _MOST * size)
    if origin is not None:
        allowed += _LAST_PLACES * torch.finfo(wanted.dtype).eps * float(origin.double().norm())
    if not error:
        return 0.0
    return error / allowed if allowed else inf


def _distance(a: Any, b: Any) -> float:
    """Return the norm of the difference of two floating-point tensors, in float64; 0 for what is none."""
    if not isinstance(a, Tensor) or a.dtype not in TOLERANCE:
        return 0.0
    return float((a.double() - b.double()).masked_fill(_same(a, b), 0).norm())


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _way(wanted: Any, origin: Tensor | None) -> Tensor | None:
    """Return how far a tensor is from where it started, in float64; None for what is no floating-point tensor."""
    if not isinstance(wanted, Tensor) or wanted.dtype not in TOLERANCE:
        return None
    way = wanted.double() if origin is None else wanted.double() - origin.double()
    return way.masked_fill(~way.isfinite(), 0)
