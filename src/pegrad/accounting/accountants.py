"""Two sound bounds on what an event of dp-accounting costs, by its two accountants.

`pegrad.accounting` says which event a run of DP-SGD is; here an event and a delta become an epsilon.
"""

import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pegrad.accounting.balls_in_bins import BallsInBinsEvent, divergences

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Relation = Literal["add_or_remove", "replace"]

# The interval of a discretised privacy loss, over epsilon. Its rounding over T steps is about T·interval²/8, and that
# is kept small beside epsilon as well; the last number bounds the points of the grid.
_INTERVAL, _ROUNDING, _POINTS = 5e-5, 1.25e-4, 2**18
_LEAST_INTERVAL = 1e-5

# Each point of a mixture's grid is found by a search, so there are fewer.
_MIXTURE_POINTS = 2**12

# Privacy loss distributions are composed by a Fourier transform to the power of T, whose rounding moves delta by up to
# half of T·2^-52, measured over 2 to 10^7 steps against the Gaussian mechanism's closed form; charged eightfold.
_TRANSFORM_ERROR = 4 * 2.0**-52

# What is left of a privacy loss's weight where its distribution may end.
_TAIL = 1e-15

# Beyond, dp-accounting may take minutes, and its Rényi bound is all there is.
_MOST_STEPS = 2**20

# Where to begin for an event that the Rényi accountant does not know: at an interval of 1.
_GUESS = 1 / _INTERVAL


def rdp_epsilon(dp: ModuleType, event: "DpEvent", delta: float, relation: Relation = "add_or_remove") -> float:
    """Bound epsilon by Rényi divergences.

    Raises:
        UnsupportedEventError: the accountant does not know the event.
    """
    accountant = _renyi(dp, event, relation)
    epochs = [(leaf, count) for leaf, count in _leaves(dp, event) if isinstance(leaf, BallsInBinsEvent)]
    if not epochs:
        return float(accountant.get_epsilon(delta))
    orders = tuple(accountant.orders.tolist())
    dealt = [count * divergences(each.noise_multiplier, each.bins, orders) for each, count in epochs]
    return float(dp.rdp.compute_epsilon(orders, accountant.rdp + np.sum(dealt, axis=0), delta)[0])


def pld_epsilon(dp: ModuleType, event: "DpEvent", delta: float, relation: Relation = "add_or_remove") -> float:
    """Bound epsilon by privacy loss distributions and by Rényi divergences, and return the smaller bound.

    Where only one accountant knows the event, its bound is returned. Losses are rounded up to multiples of an interval,
    which suits the Rényi bound and is refined where the answer is far below. A bound found at an interval that is too
    coarse would ask for one as coarse, and one fixed interval would take minutes for a large epsilon and overstate a
    small one many times.

    Raises:
        UnsupportedEventError: no accountant knows the event.
    """
    if relation == "replace" or not dp.pld.PLDAccountant(_relation(dp, relation)).supports(event):
        return rdp_epsilon(dp, event, delta, relation)
    steps = max(1, sum(count for _, count in _leaves(dp, event)))
    try:
        accountant = _renyi(dp, _changed(dp, event, _without_sampling), relation)
    except dp.UnsupportedEventError:
        bound, guess, farthest = math.inf, _GUESS, 0.0
    else:
        bound = guess = float(accountant.get_epsilon(delta))
        farthest = float(accountant.get_epsilon(min(delta, _TAIL)))  # no loss of weight is larger
        if farthest > _POINTS or steps > _MOST_STEPS:
            return bound
    finest = max(_LEAST_INTERVAL, farthest / _POINTS, _widest_mixture(dp, event) / _MIXTURE_POINTS)
    while True:
        interval = max(min(_INTERVAL * guess, math.sqrt(8 * _ROUNDING * guess / steps)), finest)
        bound = min(bound, _pld_bound(dp, event, delta - steps * _TRANSFORM_ERROR, interval))
        if bound == 0 or bound > guess / 2 or interval == finest:
            return bound
        guess = bound


def _renyi(dp: ModuleType, event: "DpEvent", relation: Relation) -> Any:
    """Compose all but epochs of balls-in-bins."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of each order that does not converge, and does without it
    try:
        accountant = dp.rdp.RdpAccountant(neighboring_relation=_relation(dp, relation))
        return accountant.compose(_changed(dp, event, _without_epochs))
    finally:
        log.setLevel(level)


def _relation(dp: ModuleType, relation: Relation) -> Any:
    kinds = dp.NeighboringRelation
    return kinds.REPLACE_ONE if relation == "replace" else kinds.ADD_OR_REMOVE_ONE


def _pld_bound(dp: ModuleType, event: "DpEvent", delta: float, interval: float) -> float:
    accountant = dp.pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, interval).compose(event)
    return float(accountant.get_epsilon(delta)) if delta > 0 else math.inf


def _leaves(dp: ModuleType, event: "DpEvent", count: int = 1) -> list[tuple["DpEvent", int]]:
    """The mechanisms that an event composes, and how often each."""
    if isinstance(event, dp.SelfComposedDpEvent):
        return _leaves(dp, event.event, count * event.count)
    if isinstance(event, dp.ComposedDpEvent):
        return [leaf for each in event.events for leaf in _leaves(dp, each, count)]
    return [(event, count)]


def _widest_mixture(dp: ModuleType, event: "DpEvent") -> float:
    """The largest loss of weight of a mixture of Gaussians that an event composes, or 0."""
    mixtures = [leaf for leaf, _ in _leaves(dp, event) if isinstance(leaf, dp.dp_event.MixtureOfGaussiansDpEvent)]
    distances = [max(mixture.sensitivities) / mixture.standard_deviation for mixture in mixtures]
    return max([distance**2 / 2 + 8 * distance for distance in distances], default=0.0)


def _changed(dp: ModuleType, event: "DpEvent", change: Callable[[ModuleType, "DpEvent"], "DpEvent"]) -> "DpEvent":
    """Put others in the place of the mechanisms that an event composes."""
    if isinstance(event, dp.SelfComposedDpEvent):
        return dp.SelfComposedDpEvent(_changed(dp, event.event, change), event.count)
    if isinstance(event, dp.ComposedDpEvent):
        return dp.ComposedDpEvent([_changed(dp, each, change) for each in event.events])
    return change(dp, event)


def _without_epochs(dp: ModuleType, event: "DpEvent") -> "DpEvent":
    return dp.NoOpDpEvent() if isinstance(event, BallsInBinsEvent) else event


def _without_sampling(dp: ModuleType, event: "DpEvent") -> "DpEvent":
    """Put in the place of what the Rényi accountant does not know what costs more.

    With one example more, a truncated batch has one more or swaps one: its sum moves by two sensitivities at most. A
    mixture's moves by the largest of its sensitivities at most.
    """
    if isinstance(event, dp.TruncatedSubsampledGaussianDpEvent):
        return dp.GaussianDpEvent(event.noise_multiplier / 2)
    if isinstance(event, dp.dp_event.MixtureOfGaussiansDpEvent):
        return dp.GaussianDpEvent(event.standard_deviation / max(event.sensitivities))
    return event
