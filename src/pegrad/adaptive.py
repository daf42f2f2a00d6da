"""Adaptive clipping: the clip norm follows a quantile of the gradients' norms, which is released privately."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pegrad._validate import GREATEST, LEAST
from pegrad.clipping import Clipping, Flat, Grouping, Weighting, as_clipping
from pegrad.errors import ArgumentError
from pegrad.trees import PyTree

Bounds = tuple[float, ...]
"""The clip norm of each clipping group."""

_FAR = math.log(GREATEST / LEAST)  # from one end to the other


@dataclass(frozen=True)
class Adaptive:
    """A clip norm that follows a private quantile of the norms; by groups, one for each. For `pegrad.dp_sgd`.

    After each step, `C <- C * exp(-learning_rate * (b - quantile))`, where `b` is a private estimate of the fraction of
    examples whose norm is at most C. The bounds are part of the step's state.

    How b is found, and what it costs. Every example adds +1/2 to the count of each of G groups if its norm is at most
    the group's bound, and -1/2 otherwise, so that it moves the G counts by exactly √G/2, not by up to √G. The counts
    get noise of standard deviation `count_noise_multiplier * √G/2`, are divided by the expected batch size, never the
    actual one, and 1/2 is added. Gradients and counts are of one batch: over their sensitivities and deviations, one
    example moves both together by √(1/σ_grad² + 1/σ_count²), so the step is one Gaussian mechanism with

        1/σ² = 1/σ_grad² + 1/σ_count²,    σ_grad = (σ⁻² - σ_count⁻²)^(-1/2).

    `noise_multiplier` of `dp_sgd` is that σ of both together, so ε is that of a run with a fixed clip norm. In the
    paper, σ_count is the deviation itself, not over the sensitivity 1/2, and stands there as 2σ_count.

    Args:
        clip_norm: where to begin: a number, or a clipping by groups.
        count_noise_multiplier: σ_count > `noise_multiplier`. The paper's choice is a tenth of the expected batch size,
            which leaves σ_grad all but σ.
        quantile: in [0, 1], the fraction of examples to leave unclipped.
        learning_rate: > 0.

    Raises:
        ArgumentError: a number out of its bounds.

    Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially private learning with adaptive clipping",
        Algorithm 1 and Theorem 1; by groups, He et al. 2022, "Exploring the limits of differentially private deep
        learning with group-wise clipping", Algorithm 1.
    """

    clip_norm: float | Clipping
    _: KW_ONLY
    count_noise_multiplier: float
    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.count_noise_multiplier < math.inf:
            raise ArgumentError(
                "Expected count_noise_multiplier to be a finite number >= 0, got "
                f"count_noise_multiplier={self.count_noise_multiplier}"
            )
        if not 0 <= self.quantile <= 1:
            raise ArgumentError(f"Expected quantile to be between 0 and 1, got quantile={self.quantile}")
        if not 0 < self.learning_rate < math.inf:
            raise ArgumentError(f"Expected learning_rate to be a finite number > 0, got {self.learning_rate}")
        _ = self.clipping

    @property
    def clipping(self) -> Clipping:
        """The clipping that the bounds begin as."""
        return as_clipping(self.clip_norm)

    def at(self, bounds: Bounds) -> Clipping:
        """Return the clipping of a step whose state has some bounds."""
        return Bounded(self.clipping, bounds)

    def start(self, params: PyTree) -> Bounds:
        """Return the bounds before the first step.

        Raises:
            ArgumentError: the clipping has no clip norms that could move.
        """
        weightings = self.clipping.grouping(params).weightings
        if not all(isinstance(weighting, Flat) for weighting in weightings):
            raise ArgumentError(
                f"Expected clip_norm of Adaptive to be a number or a clipping by clip norms, got "
                f"{type(self.clip_norm).__name__}, which has none to adapt"
            )
        return tuple(float(weighting.bound) for weighting in weightings)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Split the budget: σ_grad, so that gradients and counts together are a mechanism of `noise_multiplier`.

        Guarantee: σ_grad and σ_count together are σ, to rounding. Bound to `test_the_budget_is_split_exactly`.

        Raises:
            ArgumentError: the counts alone cost as much as that, or more.
        """
        if noise_multiplier == 0:
            return 0.0
        ratio = noise_multiplier / self.count_noise_multiplier if self.count_noise_multiplier else math.inf
        if ratio >= 1:
            raise ArgumentError(
                f"Expected count_noise_multiplier above noise_multiplier={noise_multiplier}, got "
                f"count_noise_multiplier={self.count_noise_multiplier}: the counts alone would spend the budget"
            )
        return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))

    def count_noise_std(self, bounds: Bounds) -> float:
        """Return the standard deviation of the noise on each group's count: the multiplier times √G/2."""
        return self.count_noise_multiplier * math.sqrt(len(bounds)) / 2

    def following(self, bounds: Bounds, counts: Tensor, expected_batch_size: float) -> Bounds:
        """Return the next step's bounds, from counts `(G,)` that have their noise."""
        fractions = (counts.double() / expected_batch_size + 0.5).tolist()
        moved = zip(bounds, fractions, strict=True)
        return tuple(self._moved(bound, fraction) for bound, fraction in moved)

    def _moved(self, bound: float, fraction: float) -> float:
        change = -self.learning_rate * (fraction - self.quantile)
        moved = bound * math.exp(min(max(change, -_FAR), _FAR))
        return min(max(moved, LEAST), GREATEST)


@dataclass(frozen=True)
class Bounded:
    """A clipping whose groups have other bounds: that of one step of `Adaptive`."""

    clipping: Clipping
    bounds: Bounds

    @property
    def sensitivity(self) -> float:
        """See `Clipping.sensitivity`."""
        return math.hypot(*self.bounds)

    def grouping(self, params: PyTree) -> Grouping:
        """See `Clipping.grouping`."""
        grouping = self.clipping.grouping(params)
        if len(grouping.weightings) != len(self.bounds):
            raise ArgumentError(
                f"The state has {len(self.bounds)} adaptive clip norms, but the step clips {len(grouping.weightings)} "
                "groups: the state is of another step"
            )
        return grouping._replace(weightings=tuple(map(self.weighting, self.bounds)))

    def weighting(self, bound: float) -> Weighting:
        """Return the weighting of a group with some bound."""
        return Flat(bound)


def centred_counts(norms: Tensor, bounds: Bounds, mask: Tensor) -> Tensor:
    """Count the examples whose norm is within the bound, less half of all examples.

    Guarantee: one example, added or removed, moves each count by exactly 1/2, whatever it is; one whose norm is not
    finite counts as above the bound, padding not at all. Bound to `test_one_example_moves_each_count_by_a_half`.

    Args:
        norms: `(B,)` for one group, `(G, B)` for several.
        bounds: of each group.
        mask: `(B,)`, boolean; False marks padding.

    Returns:
        `(G,)`, float64.
    """
    norms = norms.reshape(len(bounds), -1)
    limits = torch.stack([torch.as_tensor(bound, dtype=norms.dtype, device=norms.device) for bound in bounds])
    within = norms <= limits[:, None]
    return ((within.double() - 0.5) * mask).sum(1)
