"""Whether a graph gives what the call gives, but for rounding."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad.checking.compare import TOLERANCE

_SHARE = 1e-2  # a tensor that is next to nothing is judged by this share of its largest neighbour
_LAST_PLACES = 2  # what is rounded away where a little is added to much


def worst_difference(given: Any, wanted: Any, start: Any = None) -> float:
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
    """
    if not isinstance(wanted, tuple):
        return _worst(given, wanted, start)
    fields = zip(given, wanted, start or (None,) * len(wanted), strict=True)
    return max((_worst(*field) for field in fields), default=0.0)


def _worst(given: Any, wanted: Any, start: Any) -> float:
    tensors, expected = trees.leaves(given), trees.leaves(wanted)
    origins = trees.leaves(start) if start is not None else [None] * len(expected)
    ways = [_way(tensor, origin) for tensor, origin in zip(expected, origins, strict=True)]
    scale = max((float(way.norm()) for way in ways if way is not None), default=0.0)
    columns = zip(tensors, expected, origins, ways, strict=True)
    return max((_far(*column, scale) for column in columns), default=0.0)


def _far(given: Any, wanted: Any, origin: Tensor | None, way: Tensor | None, scale: float) -> float:
    if not isinstance(wanted, Tensor):
        return 0.0 if given == wanted else inf
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return inf
    same = (given == wanted) | (given.isnan() & wanted.isnan())
    if way is None or not bool(given.isfinite().eq(wanted.isfinite()).all()):
        return 0.0 if bool(same.all()) else inf
    error = float((given.double() - wanted.double()).masked_fill(same, 0).norm())
    allowed = TOLERANCE[wanted.dtype] * max(float(way.norm()), _SHARE * scale)
    if origin is not None:
        allowed += _LAST_PLACES * torch.finfo(wanted.dtype).eps * float(origin.double().norm())
    if not error:
        return 0.0
    return error / allowed if allowed else inf


def _way(wanted: Any, origin: Tensor | None) -> Tensor | None:
    """Return how far a tensor is from where it started, in float64; None for what is no floating-point tensor."""
    if not isinstance(wanted, Tensor) or wanted.dtype not in TOLERANCE:
        return None
    way = wanted.double() if origin is None else wanted.double() - origin.double()
    return way.masked_fill(~way.isfinite(), 0)
