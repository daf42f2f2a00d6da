"""Squared norms of gradients that are not kept: looked at, then trusted.

What rounding may have spoilt is made again, in float64, row by row.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.assumptions import any_row
from pegrad.clipping.weights import Number
from pegrad.numerics import norm_bounds, squared_norms
from pegrad.plan.candidates import Candidate
from pegrad.plan.parts import Outer, Part, inner
from pegrad.reductions import rounding
from pegrad.reductions.native import exact_rows, stacked_parts, wide_rows
from pegrad.rules.gram import Squares
from pegrad.rules.site import Site

_MANY = 64  # more than the windows of a convolution that a number of its input is in, as a rule


class Found(NamedTuple):
    """The squared norms of one parameter's gradients, as they were found."""

    parts: Sequence[Part]
    """The uses of the parameter."""
    squares: Sequence[Squares]
    """Of each part; none where gradients were stacked."""
    stacked: Tensor | None = None
    """Of the stacked gradients, `(B,)`."""

    @classmethod
    def by(cls, choice: Candidate, parts: Sequence[Part], batch: int) -> "Found":
        """Run the kernels that were chosen."""
        if choice.stacks:
            rows = stacked_parts(choice.kernels, parts, batch)
            return cls(parts, (), torch.cat([squared_norms(some) for some in rows]))
        return cls(parts, [kernel.run(p.x, p.g) for kernel, p in zip(choice.kernels, parts, strict=True)])

    @property
    def positions(self) -> int:
        """How many terms an example's gradient is the sum of."""
        return sum(part.positions for part in self.parts)

    @property
    def kind(self) -> Hashable:
        """What those that can be looked at together have in common."""
        if len(self.squares) != 1:
            return id(self)
        return self.positions, self.parts[0].g.dtype


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


def guarded(found: Sequence[Found], batch: int, floor: Number) -> list[tuple[Tensor, list[Tensor]]]:
    """Look at squared norms of several parameters' gradients, and make those that cannot be trusted in float64.

    Args:
        found: for each parameter what was found.
        batch: B.
        floor: the norm below which nothing depends on it.

    Returns:
        For each parameter the squared norms, `(B,)`, float64; infinite where even that cannot be trusted, or where the
        gradient is not finite. And for each of its parts the errors of the rows' shares in a native sum, `(B,)`.
    """
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for i, each in enumerate(found):
        kinds[each.kind].append(i)
    answers: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for alike in kinds.values():
        those = [found[i] for i in alike]
        squares, errors, shares = _with_errors(those, batch)
        mistrusted = rounding.mistrusted_norms(squares, errors, floor, those[0].positions)
        if any_row(mistrusted):
            for i in mistrusted.any(1).nonzero().squeeze(1).tolist():
                _remake(squares[i], those[i].parts, mistrusted[i].nonzero().squeeze(1), batch, floor)
        for i, row, *of_parts in zip(alike, squares.clamp(min=0), *shares, strict=True):
            answers[i] = row, of_parts
    return [answers[i] for i in range(len(found))]


def _with_errors(those: Sequence[Found], batch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the squared norms of those of a kind and their errors, `(those, B)`, and the shares' of each part."""
    first = those[0]
    if first.stacked is not None:
        shares = [Magnitudes(part.site, part.x, part.g).share_errors() for part in first.parts]
        total = sum(shares[1:], start=shares[0])
        errors = total * (2 * first.stacked.sqrt() + total)
        return first.stacked[None], errors[None], [share[None] for share in shares]
    if len(first.parts) == 1:
        squares, errors, share = _squares_and_errors(
            [each.squares[0] for each in those], [each.parts[0] for each in those], batch, first.positions
        )
        return squares, errors, [share]
    each_part = [
        _squares_and_errors([squares], [part], batch, first.positions)
        for squares, part in zip(first.squares, first.parts, strict=True)
    ]
    squares = _square_of_sum([part[0] for part in each_part], first.parts)
    errors = len(first.parts) * torch.stack([part[1] for part in each_part]).sum(0)  # by Cauchy and Schwarz
    return squares, errors, [part[2] for part in each_part]


def _squares_and_errors(
    squares: Sequence[Squares], parts: Sequence[Part], batch: int, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tell how far what kernels found may be off.

    Args:
        squares: what they found.
        parts: of which: of as many positions each, and one dtype.
        batch: B.
        positions: how many terms an example's whole gradient is the sum of, other uses' among them.

    Returns:
        The squared norms, their errors, and those of the rows' shares: `(parts, B)`, float64.
    """
    dtype = parts[0].g.dtype
    found = torch.stack([row for each in squares for row in each]).double().unflatten(0, (len(parts), -1))
    norms, terms, *_ = found.unbind(1)
    # Products that are too small for the dtype are lacking in a Gram matrix, on its diagonal as well.
    lacking = torch.finfo(dtype).tiny * (_MANY * max(part.numbers for part in parts) // batch)
    lengths = (found[:, 2:].clamp(min=0) * (1 + 1e-4)).add_(lacking)  # of inputs and outputs
    errors = rounding.gram_error(terms, positions, dtype) + lengths.sum(1).add_(1).mul_(lacking)
    return norms, errors, rounding.sum_error(lengths.prod(1).sqrt_(), parts[0].positions, dtype)


def _square_of_sum(squares: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Square the norm of a sum of gradients that are sums of outer products, from their squared norms."""
    outers = [outer for part in parts if (outer := Outer.of(part)) is not None]
    assert len(outers) == len(parts), "chosen for gradients that are sums of outer products"
    total = torch.stack(list(squares)).sum(0)
    for a, b in combinations(outers, 2):
        total += 2 * inner(a, b).double()
    return total


def _remake(squares: Tensor, parts: Sequence[Part], rows: Tensor, batch: int, floor: Number) -> None:
    """Write the squared norms of some rows, from gradients in float64, over those that were found."""
    dtype = parts[0].g.dtype
    for some, grads in exact_rows(parts, rows, batch):
        exact = squared_norms(grads)
        wide = [wide_rows(part, some, batch) for part in parts]
        error = torch.stack([Magnitudes(part.site, part.x, part.g).share_errors() for part in wide]).sum(0)
        lost = rounding.hopeless(exact.sqrt(), error, floor) & (floor > 0)
        lost |= ~(exact <= torch.finfo(dtype).max)
        squares[some] = exact.masked_fill(lost, torch.inf)
