"""`python -m pegrad calibrate`: the one number of a run that is left open, so that the run spends a budget.

What is found is rounded to the digits that are shown, to the side that costs less: whoever types it gets what is shown.
"""

import argparse
import decimal
import importlib
import math
from collections.abc import Callable
from functools import partial

from rich.console import Console

from pegrad import accounting
from pegrad.cli.runs import Accountant, Run, number_of_steps, sampling_rate, table
from pegrad.errors import ArgumentError

_PRECISION = 1e-4
_DIGITS = 5
_STRIDES = 20  # of which the range of what is looked for consists
_MOST_STEPS = 2**20
_LEAST_DELTA, _MOST_DELTA = 1e-15, 0.5  # below, the accountants' own rounding is all there is


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: a number out of its bounds, no answer within the bounds of what is looked for, or a missing
            package.
    """
    rate = sampling_rate(options)
    steps = options.steps if rate is None else number_of_steps(options, rate)
    given = {
        "sampling_rate": rate,
        "noise_multiplier": options.noise_multiplier,
        "steps": steps,
        "delta": options.delta,
    }
    (name,) = (name for name, value in given.items() if value is None)
    known = {name: value for name, value in given.items() if value is not None}
    found = _SEARCHES[name](options.epsilon, partial(Run, options.num_examples, **known))
    title = f"{name.replace('_', ' ')} for ε = {options.epsilon:g}"
    Console(highlight=False).print(table(title, found, name))


def _least_noise(epsilon: float, make: Callable[..., Run]) -> Run:
    some = make(noise_multiplier=1.0)
    sigma = accounting.noise_multiplier_for(epsilon, some.delta, some.sampler, some.steps)
    return make(noise_multiplier=_rounded(sigma, decimal.ROUND_CEILING))


def _most_steps(epsilon: float, make: Callable[..., Run]) -> Run:
    def whole(steps: float) -> Run:
        return make(steps=round(steps))

    refusals = (
        f"Not even one step costs as little as epsilon={epsilon:g}: more noise, or smaller batches",
        f"More than {_MOST_STEPS} steps cost no more than epsilon={epsilon:g}: less noise would do",
    )
    steps = math.ceil(_last(epsilon, whole, 1, _MOST_STEPS, *refusals) * (1 + _PRECISION))
    while whole(steps).epsilon() > epsilon:
        steps -= max(1, int(_PRECISION * steps))
    return whole(steps)


def _largest_rate(epsilon: float, make: Callable[..., Run]) -> Run:
    least = 1 / make(sampling_rate=1.0).num_examples
    refusal = f"Not even batches of one example cost as little as epsilon={epsilon:g}: more noise, or fewer steps"
    rate = _last(epsilon, lambda q: make(sampling_rate=q), least, 1.0, refusal)
    return _settled(epsilon, lambda q: make(sampling_rate=q), rate, decimal.ROUND_FLOOR)


def _least_delta(epsilon: float, make: Callable[..., Run]) -> Run:
    refusal = f"No delta up to {_MOST_DELTA} makes it cost as little as epsilon={epsilon:g}: more noise, or fewer steps"
    delta = _last(epsilon, lambda delta: make(delta=delta), _MOST_DELTA, _LEAST_DELTA, refusal)
    return _settled(epsilon, lambda delta: make(delta=delta), delta, decimal.ROUND_CEILING)


def _last(
    epsilon: float,
    make: Callable[[float], Run],
    cheap: float,
    dear: float,
    too_dear: str,
    too_cheap: str | None = None,
) -> float:
    """Return about the last number, on the way from `cheap` to `dear`, with which a run costs at most epsilon.

    Raises:
        ArgumentError: with `too_dear`, if there is no such; with `too_cheap`, if all are. Where that is None, `dear` is
            returned.
    """

    def excess(logarithm: float, accountant: Accountant = "pld") -> float:
        cost = make(math.exp(logarithm)).epsilon(accountant)
        return max(-9.0, min(9.0, math.log(max(cost, 1e-9) / epsilon)))  # nearly straight, and never infinite

    optimize = importlib.import_module("scipy.optimize")  # which comes with dp-accounting
    start, end = math.log(cheap), math.log(dear)
    low = start
    if excess(start, "rdp") <= 0:  # a looser bound, found in no time: what it allows is allowed
        low = end if excess(end, "rdp") <= 0 else optimize.brentq(excess, start, end, ("rdp",), xtol=_PRECISION / 2)
    if excess(low) > 0:
        raise ArgumentError(too_dear)
    while low != end:
        high = low + (end - start) / _STRIDES
        high = end if (end - high) * (end - start) <= 0 else high
        if excess(high) > 0:
            return math.exp(optimize.brentq(excess, low, high, xtol=_PRECISION / 2))
        low = high
    if too_cheap is not None:
        raise ArgumentError(too_cheap)
    return dear


def _settled(epsilon: float, make: Callable[[float], Run], value: float, rounding: str) -> Run:
    """Round a number to the side that costs less, and go on to that side until the run costs at most epsilon."""
    found = make(_rounded(value, rounding))
    while found.epsilon() > epsilon:
        value *= 1 + _PRECISION if rounding == decimal.ROUND_CEILING else 1 - _PRECISION
        found = make(_rounded(value, rounding))
    return found


def _rounded(value: float, rounding: str) -> float:
    return float(decimal.Context(prec=_DIGITS, rounding=rounding).create_decimal(value))


_SEARCHES: dict[str, Callable[[float, Callable[..., Run]], Run]] = {
    "noise_multiplier": _least_noise,
    "steps": _most_steps,
    "sampling_rate": _largest_rate,
    "delta": _least_delta,
}
