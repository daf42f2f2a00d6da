"""Decisions that Python takes by the numbers in tensors: taken as they come, or noted as assumptions of a graph.

Eagerly, a decision is what the numbers say. While `pegrad.compile` records a call, there are numbers too, those of the
example arguments; the graph that comes of it is right for other numbers as long as they decide the same. So each
decision is noted, as a boolean that the graph computes: `Assumptions.held`. Where one does not hold, what the graph
gave is thrown away and the call is made again, eagerly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Assumptions:
    """What a recorded call took for granted."""

    def __init__(self) -> None:
        self._conditions: list[Tensor] = []

    def suppose(self, condition: Tensor) -> None:
        """Note a condition, a boolean scalar that holds for the example arguments."""
        self._conditions.append(condition)

    def held(self, like: Tensor) -> Tensor:
        """Return whether all conditions hold: a boolean scalar.

        Args:
            like: where the scalar lies.
        """
        if not self._conditions:
            return torch.ones((), dtype=torch.bool, device=like.device)
        return torch.stack([condition.to(like.device) for condition in self._conditions]).all()


_RECORDINGS: WeakKeyDictionary[Any, Assumptions] = WeakKeyDictionary()  # by the mode that records


def decided(condition: Tensor) -> bool:
    """Return what a boolean scalar is; while a call is recorded, note that it was assumed to be that."""
    assumptions = current()
    if assumptions is None:
        return bool(condition)
    with unrecorded():
        value = bool(condition)
    assumptions.suppose(condition if value else ~condition)
    return value


def current() -> Assumptions | None:
    """Return the assumptions of the call that is being recorded; None: none is."""
    if not _RECORDINGS:
        return None
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else _RECORDINGS.get(mode)


@contextmanager
def assuming() -> Iterator[Assumptions]:
    """Inside the block, which is itself recorded, decisions are noted."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    _RECORDINGS[mode] = assumptions = Assumptions()
    try:
        yield assumptions
    finally:
        del _RECORDINGS[mode]


def unrecorded() -> Any:
    """Inside the block, operations are no part of the graph, and tensors may be asked for their numbers."""
    if current() is None:
        return nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()
