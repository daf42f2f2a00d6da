"""Leaves clipped group by group, each by a norm of its own."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import optree

from pegrad import trees
from pegrad._validate import check_scale
from pegrad.clipping.base import Grouping
from pegrad.clipping.flat import Flat
from pegrad.clipping.weights import Weighting
from pegrad.errors import ArgumentError, LeafError
from pegrad.trees import PyTree

Kind = Callable[[float], Weighting]
"""From a group's bound to its weighting: `Flat`, `Normalised`, `functools.partial(Automatic, gamma=0.1)`."""


class _Equal(ABC):
    """Groups with equal bounds: C/√G each, so that they come to C."""

    clip_norm: float
    weighting: Kind

    def __post_init__(self) -> None:
        check_scale("clip_norm", self.clip_norm)
        _bounded(self.weighting, self.clip_norm)

    @property
    def sensitivity(self) -> float:
        """See `Clipping.sensitivity`."""
        return self.clip_norm

    @abstractmethod
    def _labels(self, spec: optree.PyTreeSpec) -> tuple[str, ...]:
        """Name the group of each leaf of a structure."""

    def grouping(self, params: PyTree) -> Grouping:
        """See `Clipping.grouping`."""
        labels = self._labels(trees.flatten(params)[1])
        groups = {name: group for group, name in enumerate(dict.fromkeys(labels))}
        each = _bounded(self.weighting, self.clip_norm / math.sqrt(len(groups)))
        return Grouping(tuple(groups[label] for label in labels), (each,) * len(groups), tuple(groups))


@dataclass(frozen=True)
class PerLeaf(_Equal):
    """Each leaf by itself, to `C/√G` where there are G leaves.

    The loss must depend on each by more than rounding: see "Not covered" in `docs/rounding.md`.

    Args:
        clip_norm: bound C on the norm of a clipped gradient over all leaves, which is the sensitivity.
        weighting: how each leaf is clipped to its bound: `Flat`, or another that takes a bound and keeps to it.

    Raises:
        ArgumentError: `clip_norm` is not between 1e-9 and 1e9, or `weighting` makes nothing with the bound it is given.

    Source: McMahan et al. 2018, "Learning differentially private recurrent language models" (per-layer clipping);
    He et al. 2022, "Exploring the limits of differentially private deep learning with group-wise clipping".
    """

    clip_norm: float
    weighting: Kind = Flat

    def _labels(self, spec: optree.PyTreeSpec) -> tuple[str, ...]:
        return _prefixes(spec, sys.maxsize)


@dataclass(frozen=True)
class PerLayer(_Equal):
    """The leaves of each layer together, to `C/√G` where there are G layers. A layer is what a prefix of paths names.

    `book_keeping` then sums a layer inside the backward pass, and lets go of what it kept for it.

    Args:
        clip_norm: bound C on the norm of a clipped gradient over all leaves, which is the sensitivity.
        depth: how many entries of a path, >= 1, name a layer. A dot in a key divides it: `{"block.0.weight": ...}` is
            three deep. None: all but the last, which is a leaf's name in its module; a leaf on top is a layer.
        weighting: as for `PerLeaf`.

    Raises:
        ArgumentError: as `PerLeaf`, or `depth` is below 1.

    Source: as `PerLeaf`.

    >>> import torch
    >>> PerLayer(1.0).grouping({"a": {"w": torch.ones(2), "b": torch.ones(2)}, "c": torch.ones(1)}).names
    ("params['a']", "params['c']")
    """

    clip_norm: float
    depth: int | None = None
    weighting: Kind = Flat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and (not isinstance(self.depth, int) or self.depth < 1):
            raise ArgumentError(f"Expected depth to be None or a whole number >= 1, got depth={self.depth}")

    def _labels(self, spec: optree.PyTreeSpec) -> tuple[str, ...]:
        return _prefixes(spec, self.depth)


class _Given(ABC):
    """Groups whose bounds are given: they come to the root of the sum of their squares."""

    @abstractmethod
    def _bounds(self) -> list[float]:
        """Return the bounds, group by group."""

    @property
    def sensitivity(self) -> float:
        """See `Clipping.sensitivity`: √ΣC²."""
        return math.hypot(*self._bounds())


@dataclass(frozen=True)
class ByLabel(_Given):
    """Leaves of one label together, each label with a bound of its own.

    Args:
        label: from a leaf's path, such as `['conv']['weight']`, to its label.
        bounds: a bound C for each label. The sensitivity is √ΣC².
        weighting: as for `PerLeaf`.

    Raises:
        ArgumentError: `label` is not callable, there is no bound, or one is not between 1e-9 and 1e9; on a call, a
            label that no leaf has.
        LeafError: on a call, a leaf whose label has no bound.

    Source: He et al. 2022 (group-wise clipping).

    >>> clipping = ByLabel(lambda path: "bias" if "bias" in path else "weight", {"bias": 0.3, "weight": 0.4})
    >>> clipping.sensitivity
    0.5
    """

    label: Callable[[str], Any]
    bounds: Mapping[Any, float]
    weighting: Kind = Flat

    def __post_init__(self) -> None:
        if not callable(self.label) or not isinstance(self.bounds, Mapping) or not self.bounds:
            raise ArgumentError(
                f"Expected label to be a function and bounds a mapping of at least one label to its bound, got "
                f"{type(self.label).__name__} and {type(self.bounds).__name__}"
            )
        for label, bound in self.bounds.items():
            check_scale(f"bounds[{label!r}]", bound)
            _bounded(self.weighting, bound)
        object.__setattr__(self, "bounds", dict(self.bounds))  # a copy: the sensitivity must not change under way

    def _bounds(self) -> list[float]:
        return list(self.bounds.values())

    def grouping(self, params: PyTree) -> Grouping:
        """See `Clipping.grouping`."""
        known = list(self.bounds)
        groups = []
        for path in trees.paths(params):
            label = self.label(path)
            if label not in known:
                raise LeafError(
                    f"params{path} has the label {label!r}, which has no bound: expected one of {known}. Give it one "
                    "in bounds"
                )
            groups.append(known.index(label))
        for group, label in enumerate(known):
            if group not in groups:
                raise ArgumentError(
                    f"No leaf of params has the label {label!r} of bounds, and noise would be added for it: take it out"
                )
        weightings = tuple(_bounded(self.weighting, bound) for bound in self.bounds.values())
        return Grouping(tuple(groups), weightings, tuple(map(str, known)))


@dataclass(frozen=True)
class ByPrefix(_Given):
    """Subtrees of the parameters, each with a bound of its own.

    Args:
        bounds: a pytree of bounds C whose structure is a prefix of the parameters': the leaves below a bound are
            clipped together. The sensitivity is √ΣC².
        weighting: as for `PerLeaf`.

    Raises:
        ArgumentError: there is no bound, or one is not between 1e-9 and 1e9; on a call, a bound with no leaf below it.
        LeafError: on a call, the structure is not a prefix of the parameters'.

    Source: He et al. 2022 (group-wise clipping).

    >>> import torch
    >>> params = {"body": {"w": torch.ones(2), "b": torch.ones(2)}, "head": torch.ones(1)}
    >>> ByPrefix({"body": 3.0, "head": 4.0}).grouping(params).of
    (0, 0, 1)
    """

    bounds: PyTree
    weighting: Kind = Flat

    def __post_init__(self) -> None:
        leaves, spec = trees.flatten(self.bounds)
        if not leaves:
            raise ArgumentError("Expected bounds to hold at least one bound, got none")
        for path, bound in zip(trees.paths(self.bounds), leaves, strict=True):
            check_scale(f"bounds{path}", bound)
            _bounded(self.weighting, bound)
        object.__setattr__(self, "bounds", trees.unflatten(spec, leaves))  # a copy, as in `ByLabel`

    def _bounds(self) -> list[float]:
        return trees.leaves(self.bounds)

    def grouping(self, params: PyTree) -> Grouping:
        """See `Clipping.grouping`."""
        paths = trees.paths(self.bounds)
        groups: list[int] = []
        for group, below in enumerate(self._below(params)):
            count = len(trees.leaves(below))
            if not count:
                raise ArgumentError(
                    f"No leaf of params is below bounds{paths[group]}, and noise would be added for it: take it out"
                )
            groups += [group] * count
        weightings = tuple(_bounded(self.weighting, bound) for bound in self._bounds())
        return Grouping(tuple(groups), weightings, tuple(f"params{path}" for path in paths))

    def _below(self, params: PyTree) -> list[PyTree]:
        spec = trees.flatten(self.bounds)[1]
        try:
            return spec.flatten_up_to(params)
        except ValueError:
            reasons = optree.prefix_errors(self.bounds, params, namespace=trees.NAMESPACE)
            why = " ".join(str(reasons[0]("bounds")).split()) if reasons else "they differ"
            raise LeafError(
                f"The structure of bounds is not a prefix of that of params: {why} Give a bound for every subtree"
            ) from None


def _bounded(kind: Kind, bound: float) -> Weighting:
    """Make a weighting, and see that it has the bound."""
    if not callable(kind):
        raise ArgumentError(
            f"Expected weighting to be a function from a bound to a weighting, such as Flat, got {type(kind).__name__}"
        )
    made = kind(bound)
    if getattr(made, "bound", None) != bound:
        raise ArgumentError(
            f"Expected weighting to make a weighting of the bound that it is given, {bound:g}, got "
            f"{getattr(made, 'bound', 'none')}"
        )
    return made


@lru_cache(maxsize=64)
def _prefixes(spec: optree.PyTreeSpec, depth: int | None) -> tuple[str, ...]:
    """Write the beginnings of all paths: kept, for paths are slow to make and the same at every step."""
    return tuple(f"params{_prefix(accessor, depth)}" for accessor in spec.accessors())


def _prefix(accessor: Sequence[Any], depth: int | None) -> str:
    """Write the beginning of a path: its first `depth` entries; None: all but the last, and at least one.

    A key with dots is one entry for each of its parts.
    """
    parts = [_parts(entry) for entry in accessor]
    total = sum(map(len, parts))
    left = max(1, total - 1) if depth is None else depth
    written = ""
    for entry, names in zip(accessor, parts, strict=True):
        taken = names[:left]
        written += entry.codify("") if len(taken) == len(names) else f"[{'.'.join(taken)!r}]" if taken else ""
        left -= len(taken)
    return written


def _parts(entry: Any) -> list[str]:
    key = entry.entry
    return key.split(".") if isinstance(key, str) and isinstance(entry, optree.MappingEntry) else [str(key)]
