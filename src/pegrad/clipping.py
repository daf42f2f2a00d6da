"""Clipping: from each example's gradient norm to its weight in the sum, and what that makes of the sensitivity."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_scale
from pegrad.numerics import contract
from pegrad.tracing.batched import transformed
from pegrad.trees import PyTree


def clip_weights(squared_norms: Tensor, clip_norm: float, mask: Tensor | None = None) -> Tensor:
    """Weigh each example so that its gradient has norm at most `clip_norm`, and 0 where it has none to give.

    Args:
        squared_norms: `(B,)`, floating point. Rounding may have left them slightly below zero.
        clip_norm: the bound C, > 0.
        mask: `(B,)`, boolean; False marks padding. None: every row is an example.

    Returns:
        `(B,)`, in at least float32: `min(1, C / norm)`; 0 for padding and where the squared norm is not finite.

    Guarantee: `weight * norm <= C` for every row, up to floating-point rounding; a row that is NaN or infinite, or
    whose squared norm overflows, has weight 0. Bound to `test_clip_weights_bound_every_row`.

    Source: Abadi et al. 2016, Algorithm 1 (clip gradient).
    """
    squared_norms = squared_norms.to(torch.promote_types(squared_norms.dtype, torch.float32))
    norms = squared_norms.clamp(min=0).sqrt()
    weights = (norms / clip_norm).clamp(min=1).reciprocal()  # exactly 1 for what needs no clipping
    allowed = torch.isfinite(squared_norms)
    return weights.masked_fill(~(allowed if mask is None else allowed & mask), 0)


class Weighting(Protocol):
    """From the norms of a clipping group's gradients to their weights, and what a weighted one amounts to at most."""

    @property
    def clip_norm(self) -> float:
        """The norm below which nothing is clipped; 0 if there is no such."""

    @property
    def bound(self) -> float:
        """What the norm of one example's weighted gradient is at most; infinite if nothing bounds it."""

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """Weigh the examples, `(B,)`; zero for padding and where the squared norm is not finite."""


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


@dataclass(frozen=True)
class Flat:
    """One clip norm for the gradient over all leaves together.

    Args:
        clip_norm: bound C on the Euclidean norm.

    Raises:
        ArgumentError: it is not between 1e-9 and 1e9.

    Source: Abadi et al. 2016, Algorithm 1.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        check_scale("clip_norm", self.clip_norm)

    @property
    def bound(self) -> float:
        """See `Weighting.bound`."""
        return self.clip_norm

    sensitivity = bound

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return clip_weights(squared_norms, self.clip_norm, mask)

    def grouping(self, params: PyTree) -> Grouping:
        """See `Clipping.grouping`."""
        return Grouping.flat(len(trees.leaves(params)), self)


@dataclass(frozen=True)
class Over:
    """A weighting whose sum is divided by a public constant.

    In one with the weights: dividing the sum itself would take a second copy of it.
    """

    weighting: Weighting
    divisor: float

    @property
    def clip_norm(self) -> float:
        """See `Weighting.clip_norm`."""
        return self.weighting.clip_norm

    @property
    def bound(self) -> float:
        """See `Weighting.bound`."""
        return self.weighting.bound / self.divisor

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return self.weighting.weights(squared_norms, mask) / self.divisor


@dataclass(frozen=True)
class Weights:
    """The weights of one clipping group's gradients, example by example."""

    values: Tensor
    """`(B,)`"""
    bad: Tensor | None
    """`(B,)`, boolean: rows to leave out, as zero times what they hold might not be zero; None: no such row."""
    bound: float
    """See `Weighting.bound`."""

    @classmethod
    def of(cls, weighting: Weighting, squares: Tensor, mask: Tensor | None) -> "Weights":
        """Weigh the examples by their squared norms `(B,)`, float64."""
        values = weighting.weights(squares, mask)
        finite = not transformed() and bool(torch.isfinite(squares).all())
        return cls(values, None if finite else values == 0, weighting.bound)

    def __getitem__(self, rows: slice | Tensor) -> "Weights":
        """Take some examples' weights."""
        return Weights(self.values[rows], None if self.bad is None else self.bad[rows], self.bound)

    def contract(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum rows `(B, ...)` by weight, in that dtype or one as wide: see `pegrad.numerics.contract`."""
        return contract(self.values, rows, self.bad, dtype)


@dataclass(frozen=True)
class Unclipped:
    """Weight one for every example whose gradient is finite."""

    clip_norm = 0.0
    bound = float("inf")

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        weights = torch.isfinite(squared_norms).to(squared_norms.dtype)
        return weights if mask is None else weights.masked_fill(~mask, 0)
