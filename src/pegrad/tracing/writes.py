"""Writes of what differs from example to example into a tensor that does not: `y = torch.zeros(n); y[0] = x.sum()`.

The tensor becomes one that differs as well, in its place: whoever holds it holds the batched one from then on. That is
right as long as nobody else, a view or a graph, holds its memory, which PyTorch tells by a count.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pegrad.torch_internals import is_view, shares_memory, without_overrides

_NOT_NEW = frozenset({torch.from_numpy, torch.as_tensor, torch.asarray, torch.frombuffer, torch.from_dlpack})


@cache
def writes(name: str) -> bool:
    """Tell by its name whether a function changes its first argument: `mul_`, `__setitem__`, `__iadd__`, `__set__`."""
    return bool(
        re.fullmatch(r"[a-z]\w*_|__set(item)?__|__i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor)__", name)
    )


class Made:
    """The tensors that a loss makes, and that no example has had a part in so far."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}  # held, for else their ids would be given to others

    def note(self, result: Any, function: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
        """Note what a function returned, if that is new.

        Args:
            result: what it returned.
            function: the function.
            arguments: the tensors it was given: `x.to(dtype)` may return `x` itself, which the loss may not have made.
        """
        if isinstance(result, Tensor) and function not in _NOT_NEW and all(result is not t for t in arguments):
            self._tensors[id(result)] = result

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._tensors

    def replace(self, tensor: Tensor, batched: Tensor) -> bool:
        """Let a tensor be another one from now on, wherever it is held.

        Returns:
            Whether that was possible: it is not, where a view or a graph holds the tensor's memory as well.
        """
        with without_overrides():
            if is_view(tensor) or shares_memory(tensor):
                return False
            try:  # it counts who holds the tensor: views, and graphs that have saved it
                torch.utils.swap_tensors(tensor, batched)
            except RuntimeError:
                return False
        self._tensors.pop(id(tensor), None)
        return True
