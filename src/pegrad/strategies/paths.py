"""Losses whose path depends on the data: each path's examples run by themselves, and the answers are put together.

A run that ends in a `Split` is made again, group by group. Where no random number was drawn before, a group is the
batch's rows, picked. Where some were, the answer may depend on them, and rows picked from the batch would be dealt
other numbers: with a path that is taken with probability 0.9, a tenth of its group would be sent away once more, and
nobody would come back. So the whole batch runs again from the same random state, the group's rows in their places and
copies of one of them in the others', which are neither asked nor weighed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pegrad.assumptions import current
from pegrad.clipping import Grouping
from pegrad.errors import CompileError, LossError
from pegrad.numerics import arithmetic
from pegrad.problem import FlatLoss, Leaves, Problem, Values
from pegrad.reductions.base import Reduction
from pegrad.reductions.stack import Stack
from pegrad.strategies.base import Strategy
from pegrad.torch_internals import transformed
from pegrad.tracing.generators import Generators
from pegrad.tracing.loss import IndependentError
from pegrad.tracing.questions import Split

T = TypeVar("T")


class TooManyPathsError(Exception):
    """A batch takes so many paths that the loop is cheaper.

    Args:
        paths: at least so many.
        question: what was asked when they were found to be.
    """

    def __init__(self, paths: int, question: str) -> None:
        super().__init__(paths, question)
        self.paths = paths
        self.question = question


@dataclass(frozen=True)
class Path(Generic[T]):
    """The answer for the examples of one path."""

    answer: T
    rows: Tensor
    """Indices of its examples into the axis of examples of `answer`."""
    origin: Tensor
    """Indices of the same examples into the batch."""


@dataclass(frozen=True)
class _Part:
    problem: Problem
    rows: Tensor
    origin: Tensor
    start: Generators | None = None  # from where random numbers are drawn again; None: from where they have got to

    def picked(self, group: Tensor) -> "_Part":
        """Return a part of nothing but a group of rows."""
        mask = self.problem.mask
        problem = replace(
            self.problem,
            batch=[leaf[group] for leaf in self.problem.batch],
            mask=None if mask is None else mask[group],
            whole=self.problem.sum_rows,
        )
        return _Part(problem, torch.arange(len(group)), self._origin(group))

    def replayed(self, group: Tensor, start: Generators) -> "_Part":
        """Return a part in which a group of rows is dealt the same random numbers as before."""
        size = self.problem.batch_size
        index = torch.full((size,), int(group[0]))
        index[group] = group
        mask = torch.zeros(size, dtype=torch.bool)
        mask[group] = True
        mask = mask.to(self.problem.device)
        if self.problem.mask is not None:
            mask &= self.problem.mask
        problem = replace(self.problem, batch=[leaf[index] for leaf in self.problem.batch], mask=mask)
        return _Part(problem, group, self._origin(group), start)

    def split(self, split: Split, start: Generators) -> "list[_Part]":
        """Return the parts that this one falls into.

        Args:
            split: how.
            start: where the generators were when it began.
        """
        groups = [torch.tensor(group) for group in split.groups]
        if start.moved():
            return [self.replayed(group, start) for group in groups]
        return [self.picked(group) for group in groups]

    def run(self, run: Callable[[Problem], T], start: Generators, idle: list[IndependentError] | None) -> T:
        """Run something on this part.

        Args:
            run: what.
            start: where the generators start.
            idle: what takes note if the loss depends on no parameter here, as it may on one path of several. None:
                there it may not.
        """
        versions = [leaf._version for leaf in self.problem.batch]
        if self.start is not None:
            self.start.restore()
        try:
            answer = run(self.problem)
        except IndependentError as error:
            if idle is None:
                raise
            idle.append(error)
            start.restore()
            answer = run(replace(self.problem, loss=_anchored(self.problem.loss)))
        if idle is not None and versions != [leaf._version for leaf in self.problem.batch]:
            raise LossError(
                "The loss changes its example in place, so it is not a pure function: make a new tensor (a = a * b in "
                "place of a.mul_(b); an activation with inplace=False)"
            )
        return answer

    def _origin(self, group: Tensor) -> Tensor:
        place = torch.zeros(self.problem.batch_size, dtype=torch.int64)
        place[self.rows] = self.origin
        return place[group]


def _anchored(loss: FlatLoss) -> FlatLoss:
    """Make a loss depend on a parameter, by a sum of none of its numbers."""

    def anchored(params: Leaves, example: Leaves) -> tuple[Tensor, Leaves]:
        value, aux = loss(params, example)
        return value + params[0].reshape(-1)[:0].sum().to(value.dtype), aux

    return anchored


def by_path(problem: Problem, run: Callable[[Problem], T], most: int | None = None) -> list[Path[T]]:
    """Run something on a batch, or on the examples of each path by themselves if they take several.

    Args:
        problem: the loss, and the batch.
        run: what to run; it may end in a `Split`.
        most: how many paths there may be. None: any number.

    Returns:
        The answers. Padding is in none of them if there are several.

    Raises:
        TooManyPathsError: there are more than `most` paths.
        LossError: the loss depends on no parameter on any path, or changes its example in place.
    """
    rows = torch.arange(problem.batch_size)
    whole = _Part(problem, rows, rows)
    if transformed():
        return [Path(run(problem), rows, rows)]
    waiting, found, idle = [whole], list[Path[T]](), list[IndependentError]()
    while waiting:
        part = waiting.pop()
        start = part.start or Generators.now()
        try:
            answer = part.run(run, start, idle if part is not whole else None)
        except Split as split:
            if current() is not None:
                raise CompileError(
                    f"The loss asks a tensor for its value ({split.question}), and the examples that it is recorded "
                    "with give different answers: compile it for a batch whose examples give one, or write it with "
                    "torch.where"
                ) from None
            waiting += reversed(part.split(split, start))
            if most is not None and len(found) + len(waiting) > most:
                raise TooManyPathsError(len(found) + len(waiting), split.question) from None
        else:
            found.append(Path(answer, part.rows, part.origin))
    if len(idle) == len(found):
        raise idle[0]
    return found


def merge_rows(parts: Sequence[Tensor], paths: Sequence[Path], size: int) -> Tensor:
    """Put answers that have a row for each example into the batch's order; those that nobody gave are zero.

    Args:
        parts: one for each path, `(b, ...)`.
        paths: which examples they are of.
        size: B.

    Raises:
        LossError: the rows of one path are of another shape than those of another.
    """
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise LossError("The loss returns aux of one shape for some examples and of another for others")
    rows = torch.cat([part[path.rows] for part, path in zip(parts, paths, strict=True)])
    whole = rows.new_zeros(size, *rows.shape[1:])
    whole[torch.cat([path.origin for path in paths])] = rows
    return whole


def _merge_leaves(parts: Sequence[Leaves], paths: Sequence[Path], size: int) -> Leaves:
    return [merge_rows(column, paths, size) for column in zip(*parts, strict=True)]


def _merge_values(parts: Sequence[Values], paths: Sequence[Path], size: int) -> Values:
    losses = merge_rows([values.losses for values in parts], paths, size)
    return Values(losses, _merge_leaves([values.aux for values in parts], paths, size))


@dataclass(frozen=True)
class ByPath(Strategy):
    """A strategy, run on the examples of each path by themselves where the loss has several.

    Args:
        strategy: the strategy.
        most: how many paths there may be. None: any number.

    Raises:
        TooManyPathsError: on a call, there are more.
    """

    strategy: Strategy
    most: int | None = None

    def reduce(self, problem: Problem, reduction: Reduction) -> tuple[Leaves, Values]:
        """See `Strategy.reduce`."""
        start = Generators.now()
        paths = by_path(problem, lambda part: self.strategy.reduce(part, reduction), self.most)
        if len(paths) == 1:
            return paths[0].answer
        if not reduction.by_example:  # nothing follows from answers for some of the examples
            start.restore()
            grads, merged = self.reduce(problem, Stack())
            with arithmetic(problem.device):
                return reduction.of_stacked(grads, problem), merged
        answers, values = zip(*(path.answer for path in paths), strict=True)
        size = problem.batch_size
        return _merge_leaves(answers, paths, size), _merge_values(values, paths, size)

    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.clipped_sum`."""
        paths = by_path(problem, lambda part: self.strategy.clipped_sum(part, grouping), self.most)
        if len(paths) == 1:
            return paths[0].answer
        sums, squares, values = zip(*(path.answer for path in paths), strict=True)
        size = problem.batch_size
        # Parts come in the dtype of a sum of all the call's rows; added one after another, many would round.
        totals = [
            torch.stack(column).sum(0, dtype=torch.float64).to(column[0].dtype) for column in zip(*sums, strict=True)
        ]
        return totals, merge_rows(squares, paths, size), _merge_values(values, paths, size)
