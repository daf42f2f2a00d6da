"""What a private step asks of the ranks that take it together. Alone, it asks nothing."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from pegrad import random
from pegrad.accumulation import Added
from pegrad.per_example import ClippedGrad
from pegrad.trees import PyTree


class ClippedSum(Protocol):
    """What a step needs of a clipped gradient: `pegrad.ClippedGrad`, or one whose sum is taken over many ranks."""

    @property
    def sensitivity(self) -> float | Tensor:
        """How far one example can move what `finish` returns; while a step becomes a graph, a scalar of it."""

    @property
    def normalize_by(self) -> float:
        """The public constant that the sum is divided by."""

    def init(self, params: PyTree) -> Any:
        """Begin a sum."""

    def add(self, sums: Any, params: PyTree, batch: PyTree, mask: Tensor | None) -> Added:
        """Add a micro-batch, as `ClippedGrad.add`."""

    def finish(self, sums: Any) -> PyTree:
        """Return the sum over all that was added, on every rank."""


class Ranks(Protocol):
    """What ranks do together in one step."""

    def clipped(self, clipped: ClippedGrad) -> ClippedSum:
        """Turn a clipped gradient into one whose `finish` adds up all ranks' sums."""

    def total(self, counts: Tensor) -> Tensor:
        """Add up counts over the ranks; after `finish`."""

    def each_normal(self, key: Tensor, leaves: list[Tensor]) -> Iterator[Tensor]:
        """Draw the noise of each leaf that `finish` returned, and of the counts after them: see `random.each_normal`.

        The noise of the whole is one and the same whatever the ranks are.
        """


class _Alone:
    def clipped(self, clipped: ClippedGrad) -> ClippedSum:
        return clipped

    def total(self, counts: Tensor) -> Tensor:
        return counts

    def each_normal(self, key: Tensor, leaves: list[Tensor]) -> Iterator[Tensor]:
        return random.each_normal(key, leaves)


ALONE: Ranks = _Alone()
"""One process that takes its steps by itself."""
