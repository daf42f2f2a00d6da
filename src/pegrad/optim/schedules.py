"""Numbers that change, learning rates above all: a schedule is any function from the step, counted from 0, to one."""

import math
from collections.abc import Callable, Mapping

from pegrad.errors import ArgumentError

Schedule = Callable[[int], float]


def constant(learning_rate: float) -> Schedule:
    """Return one learning rate at every step.

    Args:
        learning_rate: a number at least 0.

    Returns:
        The schedule.

    Raises:
        ArgumentError: the learning rate is negative or not finite.
    """
    checked_rate(learning_rate)
    return lambda step: learning_rate


def cosine_decay(peak: float, steps: int, final: float = 0.0) -> Schedule:
    """Fall from `peak` to `final` along half a cosine over `steps` steps, and stay there.

    Args:
        peak: the learning rate at step 0, at least 0.
        steps: how many steps the fall takes, at least 1.
        final: the learning rate from step `steps` on, at least 0.

    Returns:
        The schedule.

    Raises:
        ArgumentError: an argument is outside its bounds.

    Source:
        Loshchilov and Hutter 2017, Equation 5, without restarts.

    >>> [round(cosine_decay(1.0, steps=2)(step), 3) for step in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return _fall(peak, steps, final, lambda passed: (1 + math.cos(math.pi * passed)) / 2)


def linear_decay(peak: float, steps: int, final: float = 0.0) -> Schedule:
    """Fall from `peak` to `final` in a straight line over `steps` steps, and stay there.

    Args:
        peak: the learning rate at step 0, at least 0.
        steps: how many steps the fall takes, at least 1.
        final: the learning rate from step `steps` on, at least 0.

    Returns:
        The schedule.

    Raises:
        ArgumentError: an argument is outside its bounds.

    >>> [linear_decay(1.0, steps=2)(step) for step in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return _fall(peak, steps, final, lambda passed: 1 - passed)


def _fall(peak: float, steps: int, final: float, left: Callable[[float], float]) -> Schedule:
    """Fall from `peak` to `final`: `left` says from the part of the steps that is over how much is left of the way."""
    checked_rate(peak, "peak")
    checked_rate(final, "final")
    expect(steps >= 1, "steps", steps, "at least 1")
    return lambda step: final + (peak - final) * left(min(step / steps, 1.0))


def exponential_decay(peak: float, steps: int, factor: float) -> Schedule:
    """Fall from `peak` by a factor in every `steps` steps, little by little.

    Args:
        peak: the learning rate at step 0, at least 0.
        steps: how many steps a fall by `factor` takes, at least 1.
        factor: a number in (0, 1].

    Returns:
        The schedule, `peak * factor ** (step / steps)`.

    Raises:
        ArgumentError: an argument is outside its bounds.

    >>> [exponential_decay(1.0, steps=2, factor=0.25)(step) for step in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """
    checked_rate(peak, "peak")
    expect(steps >= 1, "steps", steps, "at least 1")
    expect(0 < factor <= 1, "factor", factor, "a number in (0, 1]")
    return lambda step: peak * factor ** (step / steps)


def piecewise_constant(first: float, factors: Mapping[int, float]) -> Schedule:
    """Keep one learning rate, until a step multiplies it.

    Args:
        first: the learning rate at step 0, at least 0.
        factors: by step, what the learning rate is multiplied by from that step on, at least 0.

    Returns:
        The schedule.

    Raises:
        ArgumentError: an argument is outside its bounds.

    >>> [piecewise_constant(1.0, {2: 0.5, 3: 0.5})(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.25, 0.25]
    """
    checked_rate(first, "first")
    known = dict(factors)
    for factor in known.values():
        checked_rate(factor, "factor")
    return lambda step: first * math.prod(factor for start, factor in known.items() if start <= step)


def linear_warmup(then: float | Schedule, steps: int) -> Schedule:
    """Rise in a straight line over `steps` steps, then follow another schedule from its beginning.

    The first step already moves: under differential privacy a step at learning rate 0 would spend privacy for
    nothing.

    Args:
        then: the learning rate after the rise: a number at least 0, or a schedule, told the steps since then.
        steps: how many steps stay below the peak, at least 0.

    Returns:
        The schedule, whose value is `then(0) * (step + 1) / (steps + 1)` while it rises.

    Raises:
        ArgumentError: an argument is outside its bounds.

    >>> [linear_warmup(1.0, steps=3)(step) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    schedule = then if callable(then) else constant(then)
    expect(steps >= 0, "steps", steps, "at least 0")

    def warmed_up(step: int) -> float:
        return schedule(max(step - steps, 0)) * min((step + 1) / (steps + 1), 1.0)

    return warmed_up


def checked_rate(rate: float, name: str = "learning_rate") -> float:
    """Return a learning rate that is finite and not negative; raise `ArgumentError` for any other."""
    expect(0 <= rate < math.inf, name, rate, "a finite number at least 0")
    return rate


def expect(condition: bool, name: str, value: float, expected: str) -> None:
    """Raise `ArgumentError` unless an argument is what was expected."""
    if not condition:
        raise ArgumentError(f"Expected {name} to be {expected}, got {name}={value}.")
