"""What Python may ask of a tensor while a loss runs: `if x.mean() > 0`, `x.item()`, `torch.equal(x, y)`.

Under `vmap` a tensor that differs from example to example has no one answer. Here the question is asked of every row.
Where the rows agree, that is the answer; where they do not, the examples take different paths through the loss, and
`Split` says which go together. Whoever runs the loss then runs each group by itself: see `pegrad.strategies.paths`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from pegrad import trees
from pegrad.assumptions import current, unrecorded
from pegrad.errors import CompileError
from pegrad.torch_internals import is_batched, without_overrides
from pegrad.tracing.batched import batch_first

QUESTIONS: frozenset[Callable[..., Any]] = frozenset({
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__, Tensor.__contains__,
    Tensor.__array__, Tensor.__format__, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.is_nonzero, Tensor.equal,
    Tensor.allclose, torch.is_nonzero, torch.equal, torch.allclose,
})  # fmt: skip
"""Functions of tensors whose value is none."""


_TRUTHS = {Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero}
_SINGLE = {*_TRUTHS, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item}
"""Questions to a tensor of one number."""

INDEXED: frozenset[Callable[..., Any]] = frozenset({Tensor.__getitem__, Tensor.__setitem__})
"""Functions whose second argument is an index, which may ask for the ends of a slice."""


class Split(BaseException):
    """Examples give different answers, so they cannot go through the loss together.

    Not an `Exception`: a loss that catches those would go on, on a path that is not its examples' own.

    Args:
        groups: the rows that go together, as indices into the batch; padding is in none.
        question: the name of what was asked.
    """

    def __init__(self, groups: list[list[int]], question: str) -> None:
        super().__init__(f"examples give different answers to {question}")
        self.groups = groups
        self.question = question


class Inquiry:
    """Asks the examples of one run of a loss.

    Args:
        mask: `(B,)`, boolean; False marks rows that are not asked. None: all rows are.
        size: B.
    """

    def __init__(self, mask: Tensor | None, size: int) -> None:
        self._mask, self._size = mask, size
        self._split: Split | None = None

    def ask(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the answer on which all rows agree.

        Args:
            function: one of `QUESTIONS`.
            args: its arguments, of which at least one is batched.
            kwargs: those by name.

        Raises:
            Split: the rows do not agree.
        """
        name = getattr(function, "__name__", str(function))
        with without_overrides(), unrecorded():
            physical = {
                id(argument): batch_first(argument).cpu()
                for argument in trees.leaves((args, kwargs))
                if isinstance(argument, Tensor) and is_batched(argument)
            }

            def answer(row: int) -> Any:
                def pick(argument: Any) -> Any:
                    return physical[id(argument)][row] if id(argument) in physical else _on_cpu(argument)

                return function(*trees.map(pick, tuple(args)), **trees.map(pick, kwargs))

            answers = [answer(row) for row in self.rows]
        self.agree(answers, name)
        if (assumptions := current()) is not None:
            assumptions.suppose(self._same_answer(function, args, kwargs, answers[0], name))
        return answers[0]

    def _same_answer(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], answer: Any, name: str
    ) -> Tensor:
        """Compute, for the graph, whether all rows that count give an answer."""
        if function not in _SINGLE or len(args) != 1 or kwargs:
            raise CompileError(
                f"The loss asks a tensor for its values ({name}), so what it computes cannot be recorded for other "
                "examples: write it with torch.where, or leave it to eager PyTorch"
            )
        with without_overrides():
            values = batch_first(args[0]).detach().reshape(self._size)
            if function in _TRUTHS:
                same = (values != 0) == answer
            else:
                same = (values.to(torch.int64) if function is Tensor.__int__ else values) == answer
            return (same if self._mask is None else same | ~self._mask).all()

    def index(self, index: Any) -> Any:
        """Ask for the ends of the slices in an index: `x[:n]` needs one number `n`."""
        if isinstance(index, slice):
            return slice(*map(self._end, (index.start, index.stop, index.step)))
        return tuple(map(self.index, index)) if type(index) is tuple else index

    def _end(self, end: Any) -> Any:
        return self.ask(Tensor.__index__, (end,), {}) if isinstance(end, Tensor) and is_batched(end) else end

    def agree(self, answers: Sequence[Any], question: str) -> None:
        """Check that the rows' answers are one and the same.

        Args:
            answers: one for each row that is asked, in their order.
            question: its name.

        Raises:
            Split: they are not.
        """
        groups: dict[Any, list[int]] = {}
        for row, answer in zip(self.rows, answers, strict=True):
            groups.setdefault(_key(answer), []).append(row)
        if len(groups) > 1:
            self.split(list(groups.values()), question)

    @cached_property
    def rows(self) -> list[int]:
        """The rows that are asked."""
        if self._mask is None:
            return list(range(self._size))
        with unrecorded():
            rows = self._mask.nonzero().flatten().tolist()
        return rows or [0]  # in a batch of padding, any row's path is as good as another's

    def split(self, groups: list[list[int]], question: str) -> NoReturn:
        """Send the examples different ways."""
        self._split = self._split or Split(groups, question)
        raise self._split

    def check(self) -> None:
        """Raise the split that the loss has caught, if it has: by `except:`, which catches everything."""
        if self._split is not None:
            raise self._split


def _on_cpu(argument: Any) -> Any:
    return argument.cpu() if isinstance(argument, Tensor) else argument


def _key(answer: Any) -> Any:
    """Tell answers apart that a loss could tell apart: -0.0 from 0.0 too, but not NaN from NaN."""
    if hasattr(answer, "tobytes"):  # an array of numpy's
        return str(answer.dtype), answer.shape, answer.tobytes()
    return type(answer), repr(answer)
