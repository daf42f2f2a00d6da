"""An optimizer's update whose own numbers, such as a learning rate by schedule, are worked out in Python at every call.

Optimizers count steps in Python integers. In a graph those would be what they were when it was made. So the integers
of a state are left out of it: `Counter` stands for them, and what the optimizer makes of them by `pegrad.optim.numbers`
comes in as tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad.dp_sgd import DPSGD, State
from pegrad.numerics import accumulator
from pegrad.optim.numbers import Counter
from pegrad.trees import PyTree

COUNT = "a step's number"  # stands for one in a state


def without_counts(optimizer: PyTree) -> tuple[PyTree, list[int]]:
    """Leave the integers out of an optimizer's state: the state, and the integers."""
    leaves, spec = trees.flatten(optimizer)
    counts = [leaf for leaf in leaves if type(leaf) is int]
    return trees.unflatten(spec, [COUNT if type(leaf) is int else leaf for leaf in leaves]), counts


def with_counts(optimizer: PyTree, counts: Sequence[int]) -> PyTree:
    """Put integers in the place of counters."""
    return trees.map(lambda leaf: leaf.of(counts[leaf.index]) if isinstance(leaf, Counter) else leaf, optimizer)


def counting(optimizer: PyTree, take: Callable[..., Any]) -> PyTree:
    """Put counters where integers were left out."""
    leaves, spec = trees.flatten(optimizer)
    places = [i for i, leaf in enumerate(leaves) if leaf is COUNT]
    for index, place in enumerate(places):
        leaves[place] = Counter(index, take)
    return trees.unflatten(spec, leaves)


@dataclass(frozen=True)
class Numbers:
    """What an optimizer makes of its counters in one update, in the order in which it does."""

    functions: tuple[tuple[int, Callable[[int], float]], ...]
    """For each number the counter, and the function of it."""

    @classmethod
    def of(cls, step: DPSGD, params: PyTree, state: State) -> "Numbers | None":
        """Try an update, and note the numbers that it makes; None: it does more with integers, or keeps other numbers.

        Such an update cannot be a part of a graph. It is tried on gradients of zero.
        """
        found: list[tuple[int, Callable[[int], float]]] = []
        optimizer, counts = without_counts(state.optimizer)

        def take(index: int, function: Callable[[int], float]) -> Tensor:
            found.append((index, function))
            return _number(function(counts[index]))

        grads = trees.map(lambda leaf: torch.zeros_like(leaf, dtype=accumulator(leaf.dtype)), params)
        try:
            before = state._replace(optimizer=counting(optimizer, take))
            _, after = step.updated(params, [grads], before)
        except Exception:
            return None  # the update itself will say what is wrong with it, if anything is
        (old, old_spec), (new, new_spec) = trees.flatten(optimizer), trees.flatten(after.optimizer)
        kept = old_spec == new_spec and all(map(_same, old, new))
        return cls(tuple(found)) if kept else None

    def now(self, counts: Sequence[int]) -> list[Tensor]:
        """Return the numbers for a step."""
        return [_number(function(counts[index])) for index, function in self.functions]


def given(numbers: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Return a `take` that hands out numbers in their order."""
    left: Iterator[Tensor] = iter(numbers)
    return lambda index, function: next(left)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _same(old: Any, new: Any) -> bool:
    """Tell whether a leaf of a state is still what can be followed: a tensor, a counter, or a constant."""
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return isinstance(old, Tensor) and isinstance(new, Tensor)
    return isinstance(new, Counter) if old is COUNT else old is new or old == new
