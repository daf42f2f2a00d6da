"""A site's weighted sum by one native batched product, the rows that would spoil it set apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations

import torch
from torch import Tensor

from pegrad.assumptions import any_row, decided
from pegrad.clipping import Weights
from pegrad.clipping.weights import Number
from pegrad.numerics import BLOCK, FEW, norm_bounds, squared_norms, take_rows, zero_rows
from pegrad.plan.candidates import Candidate
from pegrad.plan.parts import Outer, Part, inner
from pegrad.reductions import rounding
from pegrad.rules.site import Kernel, Site

_ROWS = 512  # of one product
_MANY = 64  # more than the windows of a convolution that a number of its input is in, as a rule


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
        alone = torch.zeros_like(weights.values, dtype=torch.bool)
        for part, errors in zip(parts, self.errors, strict=True):
            alone |= rounding.mistrusted_shares(weights.values, errors, weights.bound, part.positions)
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


@dataclass(frozen=True)
class Magnitudes:
    """How large what a site's gradients are made of is, and what rounding makes of that.

    Args:
        site: a site that bounds its terms.
        x: the site's input.
        g: the gradient at its output.
    """

    site: Site
    x: Tensor
    g: Tensor

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds on the norms of the rows of `x` and `g`, one or several an example, float64."""
        g = norm_bounds(self.g)
        return norm_bounds(self.x) if self.x.is_floating_point() else torch.ones_like(g), g

    @property
    def positions(self) -> int:
        """How many terms an example's gradient is the sum of."""
        return self.site.positions(tuple(self.x.shape), tuple(self.g.shape))

    def share_errors(self) -> Tensor:
        """Bound the rounding error of each example's gradient: `(B,)`, float64."""
        amplitude = self.site.amplitude(*self.bounds, self.positions)
        assert amplitude is not None
        return rounding.sum_error(amplitude, self.positions, self.g.dtype)

    def squares_and_errors(self, kernel: Kernel, batch: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run a kernel that finds norms.

        Args:
            kernel: the kernel.
            batch: B.
            positions: how many terms an example's whole gradient is the sum of, other uses' among them.

        Returns:
            The squared norms, their errors, and those of the rows' shares: `(B,)`, float64.
        """
        found = torch.stack(kernel.run(self.x, self.g)).double()
        norms, terms, *_ = found.unbind()
        # Products that are too small for the dtype are lacking in a Gram matrix, on its diagonal as well.
        numbers = _MANY * (self.x.numel() + self.g.numel()) // batch
        lacking = torch.finfo(self.g.dtype).tiny * numbers
        lengths = (found[2:].clamp(min=0) * (1 + 1e-4)).add_(lacking)  # of inputs and outputs
        errors = rounding.gram_error(terms, positions, self.g.dtype) + lengths.sum(0).add_(1).mul_(lacking)
        return norms, errors, rounding.sum_error(lengths.prod(0).sqrt_(), self.positions, self.g.dtype)


def guarded_norms(choice: Candidate, parts: Sequence[Part], batch: int, floor: Number) -> tuple[Tensor, list[Tensor]]:
    """Find the squared norms of one parameter's gradients, those that cannot be trusted in float64, row by row.

    Args:
        choice: the kernels.
        parts: the uses of the parameter.
        batch: B.
        floor: the norm below which nothing depends on it.

    Returns:
        The squared norms, `(B,)`, float64; infinite where even that cannot be trusted, or where the gradient is not
        finite. And for each part the errors of the rows' shares in a native sum, `(B,)`.
    """
    magnitudes = [Magnitudes(part.site, part.x, part.g) for part in parts]
    positions = sum(part.positions for part in parts)
    if choice.stacks:
        squares = torch.cat([squared_norms(rows) for rows in stacked_parts(choice.kernels, parts, batch)])
        shares = [each.share_errors() for each in magnitudes]
        total = sum(shares[1:], start=shares[0])
        errors = total * (2 * squares.sqrt() + total)
    else:
        found = [
            each.squares_and_errors(kernel, batch, positions)
            for each, kernel in zip(magnitudes, choice.kernels, strict=True)
        ]
        squares, errors, shares = found[0][0], found[0][1], [part[2] for part in found]
        if len(parts) > 1:
            squares = _square_of_sum([part[0] for part in found], parts)
            errors = len(parts) * torch.stack([part[1] for part in found]).sum(0)  # by Cauchy and Schwarz
    mistrusted = rounding.mistrusted_norms(squares, errors, floor, positions)
    if any_row(mistrusted):
        dtype = parts[0].g.dtype
        for rows, grads in exact_rows(parts, mistrusted.nonzero().squeeze(1), batch):
            exact = squared_norms(grads)
            wide = [_wide_rows(part, rows, batch) for part in parts]
            error = torch.stack([Magnitudes(part.site, part.x, part.g).share_errors() for part in wide]).sum(0)
            lost = rounding.hopeless(exact.sqrt(), error, floor) & (floor > 0)
            lost |= ~(exact <= torch.finfo(dtype).max)
            squares[rows] = exact.masked_fill(lost, torch.inf)
    return squares.clamp(min=0), shares


def _square_of_sum(squares: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Square the norm of a sum of gradients that are sums of outer products, from their squared norms."""
    outers = [outer for part in parts if (outer := Outer.of(part)) is not None]
    assert len(outers) == len(parts), "chosen for gradients that are sums of outer products"
    total = torch.stack(list(squares)).sum(0)
    for a, b in combinations(outers, 2):
        total += 2 * inner(a, b).double()
    return total


def exact_rows(parts: Sequence[Part], rows: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack the gradients of some rows in float64, a few at a time: `(indices, (b, *source.shape))`."""
    numbers = parts[0].site.source.numel() + sum(part.numbers for part in parts) // batch
    for some in rows.split(max(1, BLOCK // numbers)):
        wide = [_wide_rows(part, some, batch) for part in parts]
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


def _wide_rows(part: Part, rows: Tensor, batch: int) -> Part:
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
