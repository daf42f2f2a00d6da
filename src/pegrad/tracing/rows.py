"""What PyTorch cannot batch, done row by row: `x[mask]`, `torch.unique`, whatever has no batching rule or a broken one.

Only the operation itself is a loop over the examples; the loss goes on for all of them at once. Where its results are
of one shape they are a batch again; where they are not, as those of `x[mask]`, examples of different shapes go
different ways.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad.errors import StrategyError
from pegrad.torch_internals import is_batched, without_overrides
from pegrad.tracing.batched import batch_first, on_physical_batch
from pegrad.tracing.questions import Inquiry

# What they give belongs to a graph, or to a tensor's own memory, which a row has no part in.
_OF_THE_WHOLE = frozenset({
    torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.retain_grad, Tensor.requires_grad_,
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, torch.as_strided, Tensor.as_strided,
    torch.as_strided_copy, torch.as_strided_scatter, Tensor.as_strided_scatter, Tensor.set_,
})  # fmt: skip


class Aliases:
    """Views that were taken row by row: copies, which is all the same unless one or the other is written to."""

    def __init__(self) -> None:
        self._watched: list[tuple[Tensor, int, str]] = []

    def watch(self, tensors: Sequence[Tensor], operation: str) -> None:
        """Note how some tensors are."""
        self._watched += [(tensor, tensor._version, operation) for tensor in tensors]

    def check(self) -> None:
        """Check that the tensors are as they were.

        Raises:
            StrategyError: one has changed.
        """
        for tensor, version, operation in self._watched:
            if tensor._version != version:
                raise StrategyError(
                    f"The loss changes in place what {operation} gave or took: PyTorch cannot batch that operation, so "
                    "they are no longer views of each other. Make a new tensor, or use strategy='naive'"
                )


def can_separate(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a function that changes none of its arguments may be called row by row."""
    return function not in _OF_THE_WHOLE and "out" not in kwargs


def row_by_row(
    inquiry: Inquiry,
    aliases: Aliases,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Call a function on each example's arguments by themselves.

    Args:
        inquiry: settles what is not a tensor in the results, and their shapes.
        aliases: takes note of views.
        function: changes none of its arguments.
        args: its arguments, of which at least one is batched.
        kwargs: those by name.

    Returns:
        What it returns, its tensors batched.

    Raises:
        Split: results differ in shape, or in what is not a tensor.
        Exception: the function's own, on any example that matters.
    """
    name = getattr(function, "__name__", str(function))
    leaves, spec = trees.flatten((tuple(args), kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and is_batched(leaf)]
    found: list[Any] = []
    of: Any = None
    views: list[Tensor] = []

    def run(*batches: Tensor) -> tuple[Tensor, ...]:
        nonlocal found, of

        def result(b: int) -> Any:
            own = list(leaves)
            for i, batch in zip(places, batches, strict=True):
                own[i] = batch[b]
            positional, named = trees.unflatten(spec, own)
            return trees.flatten(function(*positional, **named))

        results = {b: result(b) for b in inquiry.rows}
        inquiry.agree([_form(*results[b]) for b in inquiry.rows], name)
        found, of = results[inquiry.rows[0]]
        # Nothing depends on what the other rows hold.
        rows = [results[b][0] if b in results else found for b in range(len(batches[0]))]
        columns = [column for column in zip(*rows, strict=True) if isinstance(column[0], Tensor)]
        memory = {batch.untyped_storage().data_ptr() for batch in batches}
        if any(t.untyped_storage().data_ptr() in memory for column in columns for t in column):
            views.extend(batches)
        return tuple(torch.stack(column) for column in columns)

    with without_overrides():
        stacked = on_physical_batch(run, *(leaves[i] for i in places))
        if views:
            taken = [leaves[i] for i in places]
            aliases.watch([batch_first(t) for t in (*taken, *stacked)], name)
    batched = iter(stacked)
    return trees.unflatten(of, [next(batched) if isinstance(leaf, Tensor) else leaf for leaf in found])


def _form(leaves: Sequence[Any], spec: Any) -> Any:
    """Describe a result as far as all rows must agree on it."""
    return [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves], spec
