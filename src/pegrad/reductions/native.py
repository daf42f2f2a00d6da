"""A site's weighted sum by one native batched product, the rows that would spoil it set apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_

import torch
from torch import Tensor

from pegrad.assumptions import any_row, decided
from pegrad.clipping import Weights
from pegrad.numerics import BLOCK, FEW, take_rows, zero_rows
from pegrad.plan.parts import Part
from pegrad.reductions import rounding
from pegrad.rules.site import Kernel

_ROWS = 512  # of one product


@dataclass(frozen=True, eq=False)
class NativeSum:
    """How the weighted sum of one parameter's gradients is found, once the weights are known.

    A row's gradient may be small where the terms that it is the sum of are huge. In one product with the others, such
    a row swallows what they contribute. So a row with a share whose rounding error matters is made by itself, in
    float64, of all uses together; and the whole sum is, where it is so large that its own last places matter.

    Args:
        source: the parameter.
        errors: for each part `(B,)`, float64: the rounding error of each row's share for weight one, in terms of the
            leaves' norm.
        gain: how much longer a gradient can be at the leaves than at the source.
        apart: `(B,)`, boolean: rows whose contribution comes from elsewhere.
    """

    source: Tensor
    errors: Sequence[Tensor]
    gain: float | Tensor = 1.0
    apart: Tensor | None = None
    made: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """`(leaf, indices of the rows apart, their gradients at the leaf)`"""

    def totals(self, parts: Sequence[Part], weights: Weights, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Sum: a list of tensors and what is to be added to the gradient at each of them.

        Args:
            parts: the uses of the parameter.
            weights: of the examples.
            dtype: of the sum.
        """
        alone = reduce(
            or_,
            (
                rounding.mistrusted_shares(weights.values, errors, weights.bound, part.positions)
                for part, errors in zip(parts, self.errors, strict=True)
            ),
        )
        if self.apart is not None:
            alone &= ~self.apart
        out = _either(weights.bad, self.apart)
        chosen = alone if any_row(alone) else None
        out = _either(out, chosen)
        total = self._products(parts, replace(weights, bad=out), dtype)
        if total is None:  # so large that it is made in float64 from beginning to end
            chosen = torch.ones_like(alone) if self.apart is None else ~self.apart
            total = torch.zeros(self.source.shape, dtype=torch.float64, device=alone.device)
        if chosen is not None:
            total = (total.double() + self._exact_sum(parts, weights, chosen.nonzero().squeeze(1))).to(dtype)
        result = [(self.source, total)]
        for leaf, rows, grads in self.made:
            result.append((leaf, weights[rows].contract(grads, dtype)))
        return result

    def _products(self, parts: Sequence[Part], weights: Weights, dtype: torch.dtype) -> Tensor | None:
        total: Tensor | None = None
        for part in parts:
            summed = self._product(part, weights, dtype)
            if summed is None:
                return None
            total = part.straight(summed) if total is None else total.add_(part.straight(summed))
        return total

    def _product(self, part: Part, weights: Weights, dtype: torch.dtype) -> Tensor | None:
        """Sum all rows but those left out, natively; None if the result cannot be trusted to its last places."""
        batch, site, positions = len(weights.values), part.site, part.positions
        step = min(batch, site.rows_at_a_time(positions), _ROWS)
        native = site.summing(*part.shapes)
        assert native is not None
        bound = weights.bound / self.gain
        mistrusted = partial(rounding.mistrusted_sum, terms=step * positions, dtype=part.g.dtype, bound=bound)
        # No row of a leaf's only use is longer than the bound, and few rows cannot come to much: no need to look.
        sole = len(self.errors) == 1 and self.apart is None
        many = mistrusted([step * weights.bound] * -(-batch // step))
        looks = not sole or (decided(many) if isinstance(many, Tensor) else many)
        total: Tensor | None = None
        largest: list[Tensor] = []
        for start in range(0, batch, step):  # a weighted copy of a few rows, not of all
            some, of = part.rows(start, start + step, batch), weights[start : start + step]
            summed = native.run(*site.weigh(zero_rows(some.x, of.bad), zero_rows(some.g, of.bad), of.values))
            if looks:
                largest.append(_largest(summed))
            total = summed.to(dtype) if total is None else total.add_(summed)
        return None if looks and any_row(mistrusted(torch.stack(largest).double())) else total

    def _exact_sum(self, parts: Sequence[Part], weights: Weights, rows: Tensor) -> Tensor:
        total = torch.zeros(self.source.shape, dtype=torch.float64, device=rows.device)
        for some, grads in exact_rows(parts, rows, len(weights.values)):
            total += weights[some].contract(grads, torch.float64)
        return total


def exact_rows(parts: Sequence[Part], rows: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack the gradients of some rows in float64, a few at a time: `(indices, (b, *source.shape))`."""
    numbers = parts[0].site.source.numel() + sum(part.numbers for part in parts) // batch
    for some in rows.split(max(1, BLOCK // numbers)):
        wide = [wide_rows(part, some, batch) for part in parts]
        grads = [part.straight(part.site.exact(part.x, part.g)) for part in wide]
        yield some, sum(grads[1:], start=grads[0])


def stacked_parts(
    kernels: Sequence[Kernel], parts: Sequence[Part], batch: int, at_a_time: int | None = None
) -> Iterator[Tensor]:
    """Stack one parameter's gradients a few examples at a time: they, and what the kernels move, stay in the cache.

    Args:
        kernels: for each part, one that stacks.
        parts: the uses of the parameter.
        batch: B.
        at_a_time: how many examples; None: as many as fit.
    """
    numbers = parts[0].site.source.numel()
    for part, kernel in zip(parts, kernels, strict=True):
        numbers += (part.numbers + int(kernel.work.moved)) // batch
    step = at_a_time or max(1, BLOCK // numbers)
    for start in range(0, batch, step):
        total: Tensor | None = None
        for part, kernel in zip(parts, kernels, strict=True):
            some = part.rows(start, start + step, batch)
            rows = part.straight(kernel.run(some.x, some.g))
            total = rows if total is None else total + rows
        assert total is not None, "a parameter has at least one use"
        yield total


def stacked_pieces(kernels: Sequence[Kernel], parts: Sequence[Part], batch: int) -> list[Tensor]:
    """Stack one parameter's gradients, all of them, in pieces: some kernels need as much memory again on their way."""
    fit = 2 * BLOCK // max(1, parts[0].site.source.numel())
    return [*stacked_parts(kernels, parts, batch, max(FEW, fit // FEW * FEW))]


def wide_rows(part: Part, rows: Tensor, batch: int) -> Part:
    """Take some examples of a use, in float64."""
    taken = [take_rows(t, rows, batch) for t in (part.x, part.g)]
    x, g = (t.double() if t.is_floating_point() else t for t in taken)
    return part._replace(x=x, g=g)


def _largest(t: Tensor) -> Tensor:
    least, greatest = torch.aminmax(t)
    return torch.maximum(-least, greatest)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a | b
