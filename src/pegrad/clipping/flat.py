"""One norm over all leaves together, and the ways from it to a weight."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_scale
from pegrad.clipping.base import Clipping, Grouping
from pegrad.errors import ArgumentError
from pegrad.trees import PyTree

_LEAST_NORM = 1e-9  # below it, what a float32 gradient holds is rounding


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


class Together(ABC):
    """A clipping of one group, of all leaves; and the weighting of that group, which may serve others too."""

    clip_norm: float

    @property
    @abstractmethod
    def floor(self) -> float:
        """See `Weighting.floor`."""

    @abstractmethod
    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""

    @property
    def bound(self) -> float:
        """See `Weighting.bound`."""
        return self.clip_norm

    @property
    def sensitivity(self) -> float:
        """See `Clipping.sensitivity`."""
        return self.bound

    def grouping(self, params: PyTree) -> Grouping:
        """See `Clipping.grouping`."""
        return Grouping.flat(len(trees.leaves(params)), self)


@dataclass(frozen=True)
class Flat(Together):
    """One clip norm for the gradient over all leaves together: weight `min(1, C / ‖g‖)`. What a number stands for.

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
    def floor(self) -> float:
        """See `Weighting.floor`."""
        return self.clip_norm

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return clip_weights(squared_norms, self.clip_norm, mask)


def as_clipping(clip_norm: float | Clipping) -> Clipping:
    """Return a clipping: the one given, or `Flat` for a number.

    Raises:
        ArgumentError: it is neither, or a number that is not between 1e-9 and 1e9.
    """
    if isinstance(clip_norm, int | float | Real):
        return Flat(float(clip_norm))
    if not callable(getattr(clip_norm, "grouping", None)) or isinstance(clip_norm, type):
        raise ArgumentError(
            f"Expected clip_norm to be a number or a clipping of pegrad.clipping, such as 1.0 or PerLayer(1.0), got "
            f"{type(clip_norm).__name__}"
        )
    return clip_norm


@dataclass(frozen=True)
class Automatic(Together):
    """Weight `C / (‖g‖ + γ)`: every gradient is scaled, small ones up, so that there is no clip norm to be tuned.

    Args:
        clip_norm: C, what the norm of a weighted gradient stays below. It scales the sum, and nothing else: the
            learning rate can take its place.
        gamma: γ, > 0. Gradients much shorter than that are scaled alike, by C / γ, so that their lengths still count.

    Raises:
        ArgumentError: a number is not between 1e-9 and 1e9.

    Source: Bu, Wang, Zha & Karypis 2022, "Automatic clipping" (AUTO-S).
    """

    clip_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_scale("clip_norm", self.clip_norm)
        check_scale("gamma", self.gamma)

    @property
    def floor(self) -> float:
        """See `Weighting.floor`."""
        return self.gamma

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return self.clip_norm / (squared_norms.clamp(min=0).sqrt() + self.gamma)


@dataclass(frozen=True)
class Normalised(Together):
    """Weight `C / ‖g‖`: every gradient has norm C, only those shorter than 1e-9 less.

    A gradient of nothing but rounding is made as long as any other. Where that cannot be told from a gradient, even in
    float64, the example contributes zero and is counted as not finite. Leaves that the loss does not depend on but for
    rounding (a bias of attention's keys) must not be clipped by themselves, for rounding depends on what else is in the
    batch: see "Not covered" in `docs/rounding.md`.

    Args:
        clip_norm: C.

    Raises:
        ArgumentError: it is not between 1e-9 and 1e9.

    Source: Bu, Wang, Zha & Karypis 2022, "Automatic clipping" (AUTO-V).
    """

    clip_norm: float

    def __post_init__(self) -> None:
        check_scale("clip_norm", self.clip_norm)

    @property
    def floor(self) -> float:
        """See `Weighting.floor`."""
        return _LEAST_NORM

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`."""
        return self.clip_norm / squared_norms.clamp(min=_LEAST_NORM**2).sqrt()


@dataclass(frozen=True)
class Weighted(Together):
    """Weights by a function of one's own, and a bound that they are held to.

    Args:
        weight: from one example's norm, a float64 scalar, to its weight. It runs under `torch.func.vmap`, so it can
            see no other example, and may not ask for a value (`if norm > 1`: use `torch.where`).
        clip_norm: bound C: weights above `C / norm` are cut down to that.
        largest_weight: weights above it are cut down as well, whatever the norm is.

    Raises:
        ArgumentError: `weight` is not callable, or C or C over the largest weight is not between 1e-9 and 1e9; on a
            call, `weight` does not return a scalar tensor or cannot run under `vmap`.

    Guarantee: weights are cut down, never believed: 0 where they are negative or NaN, and at most `C / norm`. No error
    is raised for that, since whether one is raised would tell of an example. Bound to
    `test_no_weight_is_above_what_the_bound_allows`.

    >>> import torch
    >>> half = Weighted(lambda norm: torch.where(norm < 1, norm, 1 / norm), clip_norm=1.0)
    """

    weight: Callable[[Tensor], Tensor]
    clip_norm: float
    largest_weight: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.weight):
            raise ArgumentError(f"Expected weight to be a function of a norm, got {type(self.weight).__name__}")
        check_scale("clip_norm", self.clip_norm)
        check_scale("largest_weight", self.largest_weight)
        check_scale("clip_norm / largest_weight", self.floor)

    @property
    def floor(self) -> float:
        """See `Weighting.floor`."""
        return self.clip_norm / self.largest_weight

    def weights(self, squared_norms: Tensor, mask: Tensor | None) -> Tensor:
        """See `Weighting.weights`; the bound is seen to by `Weights.of`."""
        finite = torch.isfinite(squared_norms)
        norms = squared_norms.clamp(min=0).where(finite, 0).sqrt()
        try:
            return torch.func.vmap(self.weight)(norms)
        except Exception as error:
            raise ArgumentError(
                "Expected weight to be a function from one norm, a scalar tensor, to its weight, one that "
                f"torch.func.vmap can run, got {type(error).__name__} from it: use torch.where in place of if"
            ) from error
