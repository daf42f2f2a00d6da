"""Averages of the parameters over the steps, beside the parameters themselves."""

from typing import NamedTuple

import torch

from pegrad import trees
from pegrad.numerics import accumulator
from pegrad.optim.base import GradientTransformation, apply_updates
from pegrad.optim.numbers import at
from pegrad.optim.schedules import Schedule, expect
from pegrad.trees import PyTree


class AverageState(NamedTuple):
    """What `average_iterates` remembers."""

    steps: int
    """How many were taken."""
    average: PyTree
    """Of the parameters: like them, in at least float32."""


torch.serialization.add_safe_globals([AverageState])  # for torch.load's default, weights_only=True


def average_iterates(decay: float | Schedule) -> GradientTransformation:
    """Keep an exponential moving average of the parameters; it changes no update.

    It is the last link of a chain, for it must see the updates as they are applied. The average is in its state:
    `state[-1].average` of a chain's. It costs no privacy, being made of what was released.

    Args:
        decay: the weight of the past in [0, 1), or a schedule of the step. `lambda step: min(0.999, (1 + step) / (10 +
            step))` forgets the beginning sooner.

    Returns:
        A transformation whose state is an `AverageState`, which starts at the parameters themselves.

    Raises:
        ArgumentError: `decay` is out of its bounds; a schedule's is checked at every step.

    Source:
        Polyak and Juditsky 1992; De et al. 2022, "Unlocking high-accuracy differentially private image classification
        through scale", Section 3, for DP-SGD.
    """
    if not callable(decay):
        _checked(decay)

    def init(params: PyTree) -> AverageState:
        return AverageState(0, trees.map(lambda param: param.detach().to(accumulator(param.dtype), copy=True), params))

    def update(grads: PyTree, state: AverageState, params: PyTree) -> tuple[PyTree, AverageState]:
        new_weight = at(state.steps, lambda n: 1 - _checked(decay(n))) if callable(decay) else 1 - decay

        def moved(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            weight = new_weight.to(past) if isinstance(new_weight, torch.Tensor) else new_weight
            return past.lerp(new.to(past.dtype), weight)

        average = trees.map(moved, state.average, apply_updates(params, grads))
        return grads, AverageState(state.steps + 1, average)

    return GradientTransformation(init, update)


def _checked(decay: float) -> float:
    expect(0 <= decay < 1, "decay", decay, "a number in [0, 1)")
    return decay
