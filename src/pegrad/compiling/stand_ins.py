"""What stands in a graph for what Python knows better: adaptive bounds, keys and sensitivity, which become tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from pegrad import random
from pegrad.accumulation import Added
from pegrad.adaptive import Adaptive, Bounded
from pegrad.assumptions import unrecorded
from pegrad.clipping import Clipping, Flat, Weighting
from pegrad.compiling.recording import next_stage
from pegrad.per_example import ClippedGrad
from pegrad.trees import PyTree


class AdaptiveInGraph(Adaptive):
    """Adaptive clipping whose bounds are tensors; those that follow are worked out of the counts, outside."""

    @classmethod
    def of(cls, adaptive: Adaptive) -> "AdaptiveInGraph":
        """Take over what a clipping is made of."""
        return cls(**{field.name: getattr(adaptive, field.name) for field in fields(adaptive)})

    def at(self, bounds: Any) -> Clipping:
        """See `Adaptive.at`."""
        return _BoundedInGraph(self.clipping, bounds)

    def following(self, bounds: Any, counts: Tensor, expected_batch_size: float) -> Any:
        """Return the counts in the bounds' place."""
        return counts


class _BoundedInGraph(Bounded):
    @property
    def sensitivity(self) -> float:
        with unrecorded():
            return super().sensitivity

    def weighting(self, bound: Any) -> Weighting:
        return _FlatInGraph(bound)


class _FlatInGraph(Flat):
    def __post_init__(self) -> None:
        pass  # the number was checked outside


@dataclass(frozen=True)
class InGraph:
    """A process that takes its steps by itself, its noise and the scale of that given as tensors: see `Ranks`."""

    keys: Tensor
    sensitivity: Tensor
    gradients: int
    """How many leaves they have; after them are the counts of adaptive clipping."""

    def clipped(self, clipped: ClippedGrad) -> "_Clipped":
        """See `Ranks.clipped`."""
        return _Clipped(clipped, self.sensitivity)

    def total(self, counts: Tensor) -> Tensor:
        """See `Ranks.total`."""
        return counts

    def each_normal(self, key: Tensor, leaves: list[Tensor]) -> Iterator[Tensor]:
        """See `Ranks.each_normal`: noise and update are a stage of the graph."""
        next_stage(leaves[: self.gradients])
        return iter(random.each_normal_from(self.keys, leaves))


@dataclass(frozen=True)
class _Clipped:
    """A clipped gradient whose sensitivity is given: see `ClippedSum`."""

    clipped_grad: ClippedGrad
    sensitivity: Tensor

    @property
    def normalize_by(self) -> float:
        return self.clipped_grad.normalize_by

    def init(self, params: PyTree) -> Any:
        return self.clipped_grad.init(params)

    def add(self, sums: Any, params: PyTree, batch: PyTree, mask: Tensor | None) -> Added:
        return self.clipped_grad.add(sums, params, batch, mask)

    def finish(self, sums: Any) -> PyTree:
        return self.clipped_grad.finish(sums)
