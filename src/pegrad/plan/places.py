"""Which numbers of a leaf a view of it covers, read from its place in memory."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """A box of a leaf, and how a view lays its axes."""

    box: tuple[tuple[int, int], ...]
    """For each axis of the leaf, where the box starts and where it stops."""
    axes: tuple[int, ...]
    """For each axis of the view that is longer than one, the axis of the leaf."""

    def apart(self, other: "Place") -> bool:
        """Tell whether two boxes have no number in common."""
        pairs = zip(self.box, other.box, strict=True)
        return any(stop <= start or end <= begin for (begin, stop), (start, end) in pairs)


_WHOLE = Place((), ())  # of the only source of a leaf, whose place is compared with none


def place(view: Tensor, leaf: Tensor) -> Place | None:
    """Find the box of a leaf that a view covers.

    Args:
        view: a tensor in the leaf's memory, or any other.
        leaf: a leaf.

    Returns:
        The place; None if the view is none, or covers no box: every other number, say, or two axes taken for one.
    """
    if view.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr() or not view.numel():
        return None
    if view.dtype != leaf.dtype or not leaf.is_contiguous():
        return Place(tuple((0, n) for n in leaf.shape), _long(leaf)) if view is leaf else None
    rest = int(view.storage_offset()) - int(leaf.storage_offset())
    starts = []
    for n, step in zip(leaf.shape, leaf.stride(), strict=True):
        start, rest = divmod(rest, step) if n > 1 else (0, rest)  # the stride of an axis of one number says nothing
        starts.append(start)
    sizes, axes = [1] * leaf.dim(), []
    for n, step in zip(view.shape, view.stride(), strict=True):
        if n == 1:
            continue
        axis = next((i for i in _long(leaf) if leaf.stride(i) == step and i not in axes), None)
        if axis is None:
            return None
        axes.append(axis)
        sizes[axis] = n
    box = tuple((start, start + n) for start, n in zip(starts, sizes, strict=True))
    if any(not 0 <= start < stop <= n for (start, stop), n in zip(box, leaf.shape, strict=True)):
        return None
    return Place(box, tuple(axes))


def _long(t: Tensor) -> tuple[int, ...]:
    return tuple(i for i, n in enumerate(t.shape) if n > 1)


def boxes(sources: Mapping[int, Tensor], leaf: Tensor) -> dict[int, Place] | None:
    """Find the boxes that all sources of a leaf cover.

    Args:
        sources: tensors made of the leaf, each number of theirs being one of its, by any key.
        leaf: the leaf.

    Returns:
        The places, by the same keys; None if two boxes are neither equal nor apart, or one is not known.
    """
    if len(sources) == 1:
        return dict.fromkeys(sources, _WHOLE)
    found = {key: place(source, leaf) for key, source in sources.items()}
    known = {key: there for key, there in found.items() if there is not None}
    different = {there.box: there for there in known.values()}.values()
    overlap = any(not a.apart(b) for a, b in combinations(different, 2))
    return None if len(known) < len(found) or overlap else known


def flips(sources: Sequence[Tensor], places: Sequence[Place]) -> list[bool] | None:
    """Tell which sources in one box are transposes of the first; None if they differ in another way."""
    if len(sources) == 1:
        return [False]
    shape, axes = sources[0].shape, places[0].axes
    found = []
    for source, there in zip(sources, places, strict=True):
        same = source.shape == shape and there.axes == axes
        flipped = source.dim() == 2 and source.shape == shape[::-1] and there.axes == axes[::-1]
        if not same and not flipped:
            return None
        found.append(not same)
    return found
