"""Gradients at the sources of uses, brought back to the leaves and added up there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pegrad.numerics import accumulator, squared_norms, widen
from pegrad.plan.candidates import stack_kernel
from pegrad.plan.uses import ParameterUses
from pegrad.problem import Leaves
from pegrad.rules.site import Site
from pegrad.tracing.trace import Trace


class LeafAccumulator:
    """Adds up, leaf by leaf, the stacked gradients of several uses.

    Args:
        trace: the trace that is run backward.
        uses: where each use comes from.
        awaited: how many uses of each leaf will come in; None: all.
    """

    def __init__(self, trace: Trace, uses: ParameterUses, awaited: list[int] | None = None) -> None:
        self._trace = trace
        self._uses = uses
        self._awaited = list(uses.counts if awaited is None else awaited)
        self._partial: dict[int, Tensor] = {}

    def add(self, source: Tensor, stacked: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Add one use's stacked gradient; yield the leaves whose last use this was, with theirs."""
        for leaf, rows in pull_rows(self._trace, source, stacked).items():
            self._partial[leaf] = self._partial[leaf] + rows if leaf in self._partial else rows
        for leaf in self._uses.leaves(source):
            self._awaited[leaf] -= 1
            if self._awaited[leaf] == 0 and leaf in self._partial:
                yield leaf, self._partial.pop(leaf)

    def rest(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the leaves some of whose uses the loss does not depend on after all."""
        while self._partial:
            yield self._partial.popitem()


def stack_rows(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """Stack a site's gradients by the kernel that is estimated to be the cheapest: `(B, *source.shape)`."""
    return stack_kernel(site, x, g).run(x, g)


class LeafSums:
    """Adds up, leaf by leaf, sums over the batch at the sources of uses.

    Args:
        trace: the trace whose leaves they are.
        uses: where each use comes from.
        rows: how many rows are summed in all, which decides the dtype.
    """

    def __init__(self, trace: Trace, uses: ParameterUses, rows: int) -> None:
        self._trace = trace
        self._uses = uses
        self._rows = rows
        self._index = {id(leaf): i for i, leaf in enumerate(trace.params)}
        self._sums: dict[int, Tensor] = {}

    def add(self, source: Tensor, total: Tensor) -> None:
        """Bring a sum at a source back to the leaves, and add it there."""
        if id(source) in self._index:
            found = {self._index[id(source)]: total}
        else:
            found = _pull_total(self._trace, self._uses, source, total)
        for leaf, part in found.items():
            self._sums[leaf] = self._sums[leaf] + part if leaf in self._sums else part

    def leaves(self) -> Leaves:
        """Return the sums, zero for the leaves that none came to."""
        return [
            self._sums[i]
            if i in self._sums
            else torch.zeros_like(leaf, dtype=accumulator(leaf.dtype, self._rows), requires_grad=False)
            for i, leaf in enumerate(self._trace.params)
        ]


def _pull_total(trace: Trace, uses: ParameterUses, source: Tensor, total: Tensor) -> dict[int, Tensor]:
    """Bring one sum back to the leaves with all its digits, though autograd passes on no more than a dtype's."""
    digits = 8 if uses.lineages[id(source)].cast else min(_DIGITS[source.dtype], _DIGITS[total.dtype])
    narrow = torch.bfloat16 if digits == 8 else source.dtype
    sums: dict[int, Tensor] = {}
    for _ in range(-(-_DIGITS[total.dtype] // digits)):
        # A power of two keeps the piece within the range of float16, should it pass through that.
        scale = 2.0 ** int(torch.frexp(total.abs().max()).exponent) if total.numel() and digits == 8 else 1.0
        piece = (total / scale).to(narrow)
        for leaf, part in _pull(trace, source, piece.to(source.dtype), batched=False).items():
            part = part.to(total.dtype) * scale
            sums[leaf] = sums[leaf] + part if leaf in sums else part
        total = total - piece.to(total.dtype) * scale
    return sums


_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def pull_rows(trace: Trace, source: Tensor, stacked: Tensor) -> dict[int, Tensor]:
    """Bring stacked gradients `(B, *source.shape)` back to the leaves, row by row."""
    for i, leaf in enumerate(trace.params):
        if source is leaf:
            return {i: stacked}
    pulled = _pull(trace, source, stacked.to(source.dtype), batched=True)
    return {i: widen(rows) for i, rows in pulled.items()}


def _pull(trace: Trace, source: Tensor, grads: Tensor, *, batched: bool) -> dict[int, Tensor]:
    found = torch.autograd.grad(
        source, trace.params, grads, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )
    return {i: grad for i, grad in enumerate(found) if grad is not None}


def squares_of(leaves: dict[int, Tensor]) -> Tensor:
    """Sum of squares of each row over all leaves: `(B,)`, in float64."""
    return torch.stack([squared_norms(rows) for rows in leaves.values()]).sum(0)
