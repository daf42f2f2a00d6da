"""What a clipping is: which leaves are clipped together, how, and what that makes of the sensitivity."""

import math
from typing import NamedTuple, Protocol

from pegrad import trees
from pegrad.assumptions import unrecorded
from pegrad.clipping.weights import Over, Weighting
from pegrad.errors import ArgumentError
from pegrad.trees import PyTree


class Grouping(NamedTuple):
    """Which leaves are clipped together, and how each group's norms become weights."""

    of: tuple[int, ...]
    """For each leaf its group."""
    weightings: tuple[Weighting, ...]
    """For each group."""
    names: tuple[str, ...] | None = None
    """For each group; None: there is one, of all leaves."""

    @classmethod
    def flat(cls, leaves: int, weighting: Weighting) -> "Grouping":
        """Clip all leaves together."""
        return cls((0,) * leaves, (weighting,))

    def over(self, divisor: float) -> "Grouping":
        """Divide the weighted sum by a public constant."""
        return self if divisor == 1 else self._replace(weightings=tuple(Over(w, divisor) for w in self.weightings))


class Clipping(Protocol):
    """How gradients are clipped: a value."""

    @property
    def sensitivity(self) -> float:
        """What the norm of one example's clipped gradient over all leaves is at most."""

    def grouping(self, params: PyTree) -> Grouping:
        """Say which leaves are clipped together."""


def grouping_of(clipping: Clipping, params: PyTree) -> Grouping:
    """Ask a clipping for its groups, and see to it that its sensitivity is theirs.

    Raises:
        ArgumentError: a leaf has no group or a group no leaf, or the bounds come to more than the sensitivity.
        LeafError: the clipping does not fit the parameters.

    Guarantee: `sensitivity` is at least the root of the sum of the groups' squared bounds. Bound to
    `test_a_sensitivity_below_that_of_the_groups_is_refused`.
    """
    grouping = clipping.grouping(params)
    leaves, groups = len(trees.leaves(params)), len(grouping.weightings)
    names = 1 if grouping.names is None else len(grouping.names)
    if len(grouping.of) != leaves or {*grouping.of} != {*range(groups)} or names != groups:
        raise ArgumentError(
            f"Expected the grouping of {type(clipping).__name__} to have one group for each of {leaves} leaves, and a "
            f"leaf, a weighting and a name for each of its groups, got {grouping.of}, {groups} weightings and "
            f"{names} names"
        )
    with unrecorded():
        total = math.hypot(*(weighting.bound for weighting in grouping.weightings))
    if not total <= clipping.sensitivity * (1 + 1e-9):
        raise ArgumentError(
            f"Expected the sensitivity of {type(clipping).__name__} to be at least that of its groups, the root of "
            f"the sum of their squared bounds, {total:g}, got {clipping.sensitivity:g}"
        )
    return grouping
