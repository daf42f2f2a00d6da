"""Inner products of per-example gradients: with one vector, or with each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pegrad.numerics import widen
from pegrad.plan.plan import Choose
from pegrad.problem import Leaves, Problem
from pegrad.reductions.base import Reduction
from pegrad.reductions.stack import ByLeaf
from pegrad.rules.site import Site
from pegrad.tracing.trace import Trace


class Dots(Reduction):
    """Inner products with a direction: one tensor `(B,)`.

    Args:
        vectors: the direction, for each leaf one tensor of its shape, in at least float32.
    """

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self._vectors = vectors

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        return [torch.stack([_dots(rows, v) for rows, v in zip(grads, self._vectors, strict=True)]).sum(0)]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Dots":
        """See `Reduction.receiver`."""
        return _Dots(trace, self._vectors)


class _Dots(ByLeaf):
    def __init__(self, trace: Trace, vectors: Sequence[Tensor]) -> None:
        super().__init__(trace)
        self._vectors = vectors
        self._of_source = {id(leaf): vector for leaf, vector in zip(trace.params, vectors, strict=True)}
        self._total = torch.zeros_like(trace.losses).detach()

    def takes(self, site: Site, x: Tensor, g: Tensor) -> bool:
        """Run an operation that is linear in its parameter once more, with the direction in the parameter's place."""
        vector = self._of_source.get(id(site.source))
        y = None if vector is None else site.apply(x, vector)
        if y is None:
            return False
        self._total = self._total + (y * g).reshape(len(self._total), -1).sum(1)
        return True

    def visit(self, leaf: int, rows: Tensor) -> None:
        self._total = self._total + _dots(rows, self._vectors[leaf])

    def answer(self) -> Leaves:
        return [self._total]


class Gram(Reduction):
    """All inner products of the gradients: one tensor `(B, B)`; zero for padding."""

    by_example = False

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        flat = [_flat(rows) for rows in grads]
        return [_masked(torch.stack([rows @ rows.T for rows in flat]).sum(0), problem)]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Gram":
        """See `Reduction.receiver`."""
        return _Gram(trace, problem)


class _Gram(ByLeaf):
    def __init__(self, trace: Trace, problem: Problem) -> None:
        super().__init__(trace)
        self._problem = problem
        batch = len(trace.losses)
        self._total = trace.losses.new_zeros(batch, batch).detach()

    def takes(self, site: Site, x: Tensor, g: Tensor) -> bool:
        pairs = site.pairs(x, g) if self.uses.alone(site.source) else None
        if pairs is None:
            return False
        self._total = self._total + pairs
        return True

    def visit(self, leaf: int, rows: Tensor) -> None:
        flat = _flat(rows)
        self._total = self._total + flat @ flat.T

    def answer(self) -> Leaves:
        return [_masked(self._total, self._problem)]


def _masked(gram: Tensor, problem: Problem) -> Tensor:
    mask = problem.mask
    return gram if mask is None else gram.masked_fill(~(mask[:, None] & mask), 0)


def _dots(rows: Tensor, vector: Tensor) -> Tensor:
    return _flat(rows) @ vector.flatten()


def _flat(rows: Tensor) -> Tensor:
    return widen(rows).reshape(len(rows), -1)
