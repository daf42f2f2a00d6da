"""Decisions that Python takes by the numbers in tensors: taken as they come, or noted as assumptions of a graph.

Eagerly, a decision is what the numbers say. While `pegrad.compile` records a call there are numbers too, those of the
example arguments; the graph that comes of it is right for other numbers as long as they decide the same. So each
decision is noted, as a boolean that the graph computes. Where one of them does not hold, what the graph gave is thrown
away and the call is made again, eagerly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Assumptions:
    """What a call that is being recorded takes for granted.

    Attributes:
        paused: whether operations are not recorded just now.
    """

    def __init__(self) -> None:
        self.paused = False
        self._conditions: list[Tensor] = []

    def suppose(self, condition: Tensor) -> None:
        """Note a condition, a boolean scalar, that holds for the example arguments."""
        self._conditions.append(condition)

    def held(self, device: torch.device) -> Tensor:
        """Return whether all conditions hold: a boolean scalar."""
        if not self._conditions:
            return torch.ones((), dtype=torch.bool, device=device)
        return torch.stack([condition.to(device) for condition in self._conditions]).all()


_RECORDED: ContextVar[Assumptions | None] = ContextVar("recorded", default=None)


def decided(condition: Tensor) -> bool:
    """Return what a boolean scalar is; while a call is recorded, note that it was assumed to be that."""
    assumptions = _RECORDED.get()
    if assumptions is None:
        return bool(condition)
    with unrecorded():
        value = bool(condition)
    assumptions.suppose(condition if value else ~condition)
    return value


def current() -> Assumptions | None:
    """Return the assumptions of the call that is being recorded; None: none is."""
    return _RECORDED.get()


@contextmanager
def assuming(assumptions: Assumptions) -> Iterator[None]:
    """Inside the block, which is recorded, decisions are noted."""
    token = _RECORDED.set(assumptions)
    try:
        yield
    finally:
        _RECORDED.reset(token)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside the block, operations are no part of the graph, and tensors may be asked for their numbers."""
    assumptions = _RECORDED.get()
    if assumptions is None or assumptions.paused:
        yield
        return
    assumptions.paused = True
    try:
        yield
    finally:
        assumptions.paused = False
