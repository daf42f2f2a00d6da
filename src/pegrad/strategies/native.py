"""A site's weighted sum by one native batched product, the rows that would spoil it set apart."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pegrad.clipping import Weighting
from pegrad.numerics import BLOCK, contract, norm_bounds, squared_norms, take_rows, zero_rows
from pegrad.rules.gram import Squares
from pegrad.rules.site import Kernel, Site
from pegrad.strategies import rounding

_ROWS = 512  # of one product
_MANY = 64  # more than the windows of a convolution that a number of its input is in, as a rule


@dataclass(frozen=True, eq=False)
class NativeSum:
    """How the weighted sum of one site's gradients is found, once the weights are known.

    A row's gradient may be small where the terms that it is the sum of are huge. In one product with the others, such
    a row swallows what they contribute. So a row with a share whose rounding error matters is made by itself, in
    float64; and the whole sum is, where it is so large that its own last places matter.

    Args:
        site: the site.
        errors: `(B,)`, float64: the rounding error of each row's share for weight one, in terms of the leaves' norm.
        gain: how much longer a gradient can be at the leaves than at the site's source.
        apart: `(B,)`, boolean: rows whose contribution comes from elsewhere.
    """

    site: Site
    errors: Tensor
    gain: float = 1.0
    apart: Tensor | None = None
    made: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """`(leaf, indices of the rows apart, their gradients at the leaf)`"""

    def totals(
        self, x: Tensor, g: Tensor, weights: Tensor, bad: Tensor | None, weighting: Weighting, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Sum: a list of tensors and what is to be added to the gradient at each of them.

        Args:
            x: the site's input.
            g: the gradient at its output.
            weights: `(B,)`.
            bad: `(B,)`, boolean: rows to leave out; None: none.
            weighting: where the weights come from.
            dtype: of the sum.
        """
        positions = self.site.positions(tuple(x.shape), tuple(g.shape))
        alone = rounding.mistrusted_shares(weights, self.errors, weighting.bound, positions)
        if self.apart is not None:
            alone &= ~self.apart
        out = _either(bad, self.apart)
        chosen = alone.nonzero().squeeze(1)
        if len(chosen):
            out = _either(out, alone)
        total = self._product(x, g, weights, out, weighting.bound, positions, dtype)
        if total is None:  # so large that it is made in float64 from beginning to end
            chosen = (torch.ones_like(alone) if self.apart is None else ~self.apart).nonzero().squeeze(1)
            total = torch.zeros(self.site.source.shape, dtype=torch.float64, device=g.device)
        if len(chosen):
            total = (total.double() + self._exact_sum(x, g, weights, bad, chosen)).to(dtype)
        result = [(self.site.source, total)]
        for leaf, rows, grads in self.made:
            result.append((leaf, contract(weights[rows], grads, None if bad is None else bad[rows], dtype)))
        return result

    def _product(
        self,
        x: Tensor,
        g: Tensor,
        weights: Tensor,
        out: Tensor | None,
        bound: float,
        positions: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Sum all rows but those left out, natively; None if the result cannot be trusted to its last places."""
        batch = len(weights)
        step = min(batch, self.site.rows_at_a_time(positions), _ROWS)
        several = x.shape[0] // batch
        x, g = self.site.weigh(zero_rows(x, out), zero_rows(g, out), weights)
        native = self.site.summing(tuple(x.shape), tuple(g.shape))
        assert native is not None
        total: Tensor | None = None
        largest: list[float] = []
        for part in zip(x.split(step * several), g.split(step * several), strict=True):
            summed = native.run(*part)
            largest.append(_largest(summed))
            total = summed.to(dtype) if total is None else total.add_(summed)
        unsafe = rounding.mistrusted_sum(
            largest, step * positions, g.dtype, bound / self.gain if self.gain else float("inf")
        )
        return None if unsafe else total

    def _exact_sum(self, x: Tensor, g: Tensor, weights: Tensor, bad: Tensor | None, rows: Tensor) -> Tensor:
        total = torch.zeros(self.site.source.shape, dtype=torch.float64, device=g.device)
        for part, grads in exact_rows(self.site, x, g, rows, len(weights)):
            total += contract(weights[part], grads, None if bad is None else bad[part], torch.float64)
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

    def squares_and_errors(self, kernel: Kernel, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run a kernel that finds norms: their squares, errors, and those of the rows' shares: `(B,)`, float64."""
        found = Squares(*torch.stack(kernel.run(self.x, self.g)).double().unbind())
        # Products that are too small for the dtype are lacking in a Gram matrix, on its diagonal as well.
        numbers = _MANY * (self.x.numel() + self.g.numel()) // batch
        lacking = torch.finfo(self.g.dtype).tiny * numbers
        inputs, outputs = (part.clamp(min=0) * (1 + 1e-4) + lacking for part in (found.inputs, found.outputs))
        errors = rounding.gram_error(found.terms, self.positions, self.g.dtype) + lacking * (1 + inputs + outputs)
        amplitude = (inputs * outputs).sqrt()
        return found.norms, errors, rounding.sum_error(amplitude, self.positions, self.g.dtype)


def guarded_norms(
    kernel: Kernel, stacks: bool, magnitudes: Magnitudes, batch: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Find the squared norms of a site's gradients, those that cannot be trusted in float64, row by row.

    Args:
        kernel: one of the site's kernels.
        stacks: whether that kernel stacks gradients.
        magnitudes: the site, its input and the gradient at its output.
        batch: B.
        floor: the norm below which nothing depends on it.

    Returns:
        The squared norms, `(B,)`, float64; infinite where even that cannot be trusted, or where the gradient is not
        finite. And the errors of the rows' shares in a native sum, `(B,)`.
    """
    site, x, g, positions = magnitudes.site, magnitudes.x, magnitudes.g, magnitudes.positions
    if stacks:
        squares = torch.cat([squared_norms(rows) for rows in stacked_parts(kernel, site, x, g, batch)])
        shares = magnitudes.share_errors()
        errors = shares * (2 * squares.sqrt() + shares)
    else:
        squares, errors, shares = magnitudes.squares_and_errors(kernel, batch)
    mistrusted = rounding.mistrusted_norms(squares, errors, floor, positions)
    if bool(mistrusted.any()):
        for rows, grads in exact_rows(site, x, g, mistrusted.nonzero().squeeze(1), batch):
            exact = squared_norms(grads)
            errors = Magnitudes(site, *_wide_rows(x, g, rows, batch)).share_errors()
            lost = rounding.hopeless(exact.sqrt(), errors, floor) & (floor > 0)
            lost |= ~(exact <= torch.finfo(g.dtype).max)
            squares[rows] = exact.masked_fill(lost, torch.inf)
    return squares.clamp(min=0), shares


def exact_rows(site: Site, x: Tensor, g: Tensor, rows: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack the gradients of some rows in float64, a few at a time: `(indices, (b, *source.shape))`."""
    numbers = site.source.numel() + (x.numel() + g.numel()) // batch
    for part in rows.split(max(1, BLOCK // numbers)):
        yield part, site.exact(*_wide_rows(x, g, part, batch))


def _wide_rows(x: Tensor, g: Tensor, rows: Tensor, batch: int) -> list[Tensor]:
    taken = [take_rows(t, rows, batch) for t in (x, g)]
    return [t.double() if t.is_floating_point() else t for t in taken]


def stacked_parts(kernel: Kernel, site: Site, x: Tensor, g: Tensor, batch: int) -> Iterator[Tensor]:
    """Stack a site's gradients a few examples at a time: they, and what the kernel moves, stay in the cache."""
    numbers = site.source.numel() + (x.numel() + g.numel() + int(kernel.work.moved)) // batch
    step = max(1, BLOCK // numbers) * (x.shape[0] // batch)
    for start in range(0, x.shape[0], step):
        yield kernel.run(x[start : start + step], g[start : start + step])


def _largest(t: Tensor) -> float:
    least, greatest = torch.aminmax(t)
    return max(-float(least), float(greatest))


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a | b
