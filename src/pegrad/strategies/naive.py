"""`naive`: one gradient after another. Slow, obvious, and what the others are checked against."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from pegrad.clipping import Grouping
from pegrad.numerics import BLOCK
from pegrad.problem import Leaves, Problem, Values
from pegrad.reductions.base import Reduction
from pegrad.reductions.stack import Stack
from pegrad.rules.recurrent import PACKED_BY_STEPS
from pegrad.strategies.base import Stacking
from pegrad.torch_internals import transformed
from pegrad.tracing.foreign import refuse_checkpoint
from pegrad.tracing.interception import Interception


class Naive(Stacking):
    """Loop over the examples; the only strategy under which the loss may be any Python at all.

    It holds the stacked gradients of a few examples at a time, unless they are what is asked for.
    """

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Stacking.stacked`."""
        gradient = _transformed if transformed() else _plain
        grads, losses, auxes = [], [], []
        for b in range(problem.batch_size):
            grad, loss, aux = gradient(problem, [leaf[b] for leaf in problem.batch])
            grads.append(grad)
            losses.append(loss)
            auxes.append(aux)
        return _stack(grads), Values(torch.stack(losses), _stack(auxes))

    def reduce(self, problem: Problem, reduction: Reduction) -> tuple[Leaves, Values]:
        """See `Strategy.reduce`."""
        if isinstance(reduction, Stack) or not reduction.by_example:
            return super().reduce(problem, reduction)
        answers, values = zip(*(super(Naive, self).reduce(part, reduction) for part in _parts(problem)), strict=True)
        return [torch.cat(column) for column in zip(*answers, strict=True)], _join(values)

    def clipped_sum(self, problem: Problem, grouping: Grouping) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.clipped_sum`."""
        totals: Leaves = []
        squares, values = [], []
        for part in _parts(problem):
            sums, squares_here, values_here = super().clipped_sum(part, grouping)
            wide = [leaf.double() for leaf in sums]  # one after another, many float32 would round
            totals = [a + b for a, b in zip(totals, wide, strict=True)] if totals else wide
            squares.append(squares_here)
            values.append(values_here)
        dtypes = [problem.sum_dtype(leaf) for leaf in problem.params]
        totals = [total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True)]
        return totals, torch.cat(squares), _join(values)


class _Watch(Interception):
    """Refuses `torch.utils.checkpoint`, which would differentiate a module's own weights."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch in place of `func`."""
        refuse_checkpoint()
        return super().__torch_function__(func, types, args, kwargs)


def _plain(problem: Problem, example: Leaves) -> tuple[Leaves, Tensor, Leaves]:
    """Run one example under plain autograd; through what it gives, the caller can differentiate on."""
    onwards = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (*problem.params, *example))
    leaves = [
        leaf.view_as(leaf) if onwards and leaf.requires_grad else leaf.detach().requires_grad_()
        for leaf in problem.params
    ]
    with torch.enable_grad(), _Watch({}):
        loss, aux = problem.loss(leaves, example if onwards else [leaf.detach() for leaf in example])
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, create_graph=onwards, allow_unused=True)
    rows = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(problem.params, grads, strict=True)]
    if onwards:
        return rows, loss, aux
    return [row.detach() for row in rows], loss.detach(), [leaf.detach() for leaf in aux]


def _transformed(problem: Problem, example: Leaves) -> tuple[Leaves, Tensor, Leaves]:
    """Run one example under a transform of torch.func, where plain autograd may not be called."""

    def unpacked(params: Leaves, example: Leaves) -> tuple[Tensor, Leaves]:
        with Interception(PACKED_BY_STEPS):
            return problem.loss(params, example)

    grads, (loss, aux) = grad_and_value(unpacked, has_aux=True)(problem.params, example)
    return grads, loss, aux


def _parts(problem: Problem) -> Iterator[Problem]:
    """Split the rows, so that the gradients of a part are few."""
    numbers = sum(leaf.numel() for leaf in problem.params)
    step = max(1, BLOCK // max(1, numbers))
    if step >= problem.batch_size:
        yield problem
        return
    for start in range(0, problem.batch_size, step):
        rows = slice(start, start + step)
        mask = None if problem.mask is None else problem.mask[rows]
        batch = [leaf[rows] for leaf in problem.batch]
        yield replace(problem, batch=batch, mask=mask, whole=problem.sum_rows)


def _join(values: list[Values] | tuple[Values, ...]) -> Values:
    auxes = zip(*(part.aux for part in values), strict=True)
    return Values(torch.cat([part.losses for part in values]), [torch.cat(column) for column in auxes])


def _stack(rows: list[Leaves]) -> Leaves:
    return [torch.stack(column) for column in zip(*rows, strict=True)]
