"""Inner products of per-example gradients: with one vector, or with each other.

They are added up in float64, leaf by leaf and use by use, for what one leaf adds another may take away. The answer is
in the widest dtype of the parameters, float32 at the least.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from pegrad.numerics import accumulator, inner_products
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
        dots = [_dots(rows, vector) for rows, vector in zip(grads, self._vectors, strict=True)]
        return [torch.stack(dots).sum(0).to(_dtype(problem))]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Dots":
        """See `Reduction.receiver`."""
        return _Dots(trace, problem, self._vectors)


class _Dots(ByLeaf):
    def __init__(self, trace: Trace, problem: Problem, vectors: Sequence[Tensor]) -> None:
        super().__init__(trace)
        self._vectors = vectors
        self._of_source = {id(leaf): vector for leaf, vector in zip(trace.params, vectors, strict=True)}
        self._total = torch.zeros(problem.batch_size, dtype=torch.float64, device=problem.device)
        self._dtype = _dtype(problem)

    def takes(self, site: Site, x: Tensor, g: Tensor) -> bool:
        """Run an operation that is linear in its parameter once more, with the direction in the parameter's place."""
        vector = self._of_source.get(id(site.source))
        y = None if vector is None else site.apply(x, vector)
        if y is None:
            return False
        self._total = self._total + (y * g).reshape(len(self._total), -1).sum(1, dtype=torch.float64)
        return True

    def visit(self, leaf: int, rows: Tensor) -> None:
        self._total = self._total + _dots(rows, self._vectors[leaf])

    def answer(self) -> Leaves:
        return [self._total.to(self._dtype)]


class Gram(Reduction):
    """Inner products of the gradients; zero for padding.

    Args:
        first: None: those of all with all, one tensor `(B, B)`. Otherwise those of so many first examples with the
            others, one tensor `(first, B - first)`.
    """

    by_example = False

    def __init__(self, first: int | None = None) -> None:
        self._first = first

    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """See `Reduction.of_stacked`."""
        return [self.masked(torch.stack([self.products(rows) for rows in grads]).sum(0), problem)]

    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> "_Gram":
        """See `Reduction.receiver`."""
        return _Gram(trace, problem, self)

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that are multiplied with others, and those others."""
        return (rows, rows) if self._first is None else (rows[: self._first], rows[self._first :])

    def products(self, rows: Tensor) -> Tensor:
        """Multiply gradients, `(B, ...)`."""
        return inner_products(*self.sides(rows))

    def block(self, gram: Tensor) -> Tensor:
        """Take what is asked for from the products of all with all."""
        return gram if self._first is None else gram[: self._first, self._first :]

    def masked(self, gram: Tensor, problem: Problem) -> Tensor:
        """Set the products with padding to zero, and give the sum its dtype."""
        gram = gram.to(_dtype(problem))
        if problem.mask is None:
            return gram
        left, right = self.sides(problem.mask)
        return gram.masked_fill(~(left[:, None] & right), 0)


class _Gram(ByLeaf):
    def __init__(self, trace: Trace, problem: Problem, gram: Gram) -> None:
        super().__init__(trace)
        self._problem = problem
        self._gram = gram
        batch = problem.batch_size
        self._total = gram.block(torch.zeros(batch, batch, dtype=torch.float64, device=problem.device))

    def takes(self, site: Site, x: Tensor, g: Tensor) -> bool:
        pairs = site.pairs(x, g) if self.uses.alone(site.source) else None
        if pairs is None:
            return False
        self._total = self._total + self._gram.block(pairs)
        return True

    def visit(self, leaf: int, rows: Tensor) -> None:
        self._total = self._total + self._gram.products(rows)

    def answer(self) -> Leaves:
        return [self._gram.masked(self._total, self._problem)]


def _dtype(problem: Problem) -> torch.dtype:
    return reduce(torch.promote_types, (accumulator(leaf.dtype) for leaf in problem.params))


def _dots(rows: Tensor, vector: Tensor) -> Tensor:
    return inner_products(rows, vector[None]).squeeze(1)
