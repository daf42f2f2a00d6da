"""Numbers that an optimizer makes of the step's: in Python, also where the update itself is a graph."""

from collections.abc import Callable
from typing import Any


class Counter:
    """A step's number that is not known yet: `at` gives a tensor that will be filled in, in place of a number.

    Args:
        index: which of an optimizer's counters it goes by.
        take: from the counter's index and a function of its number to a tensor of what that will be, a float64 scalar.
        of: how this number follows from the one that the step begins with.
    """

    def __init__(self, index: int, take: Callable[..., Any], of: Callable[[int], int] = lambda n: n) -> None:
        self.index = index
        self.take = take
        self.of = of

    def __add__(self, other: int) -> "Counter":
        return Counter(self.index, self.take, lambda n: self.of(n) + other)


def at(step: Any, function: Callable[[int], float]) -> Any:
    """Return a number that is a function of a step's: now, or a tensor of it where the step is a `Counter`."""
    return step.take(step.index, lambda n: function(step.of(n))) if isinstance(step, Counter) else function(step)
