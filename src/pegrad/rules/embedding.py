"""Embedding: rows of a table picked by tokens, which may repeat within an example."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.numerics import squared_norms
from pegrad.rules.costs import Work
from pegrad.rules.gram import Squares
from pegrad.rules.site import Kernel, Recorder, Rule, Shape, Site, Tap


@dataclass(frozen=True, eq=False)
class EmbeddingWeight(Site):
    """The table `(V, d)` of an embedding; `x` holds the tokens, `(B, *positions)`.

    Args:
        source: see `Site`.
        operation: see `Site`.
        padding: the row that has no gradient, or None.
    """

    padding: int | None = None

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        work = Work(0, moved=2 * x[0] * self.source.numel() + 2 * prod(g))
        return {"scatter": Kernel("reduce", work, self._scatter)}

    def norming(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.norming`."""
        return {"segments": Kernel("reduce", Work(0, moved=4 * prod(g) + 20 * prod(x)), self._segments)}

    def summing(self, x: Shape, g: Shape) -> Kernel:
        """See `Site.summing`."""
        return Kernel("reduce", Work(0, moved=self.source.numel() + 2 * prod(g)), self._sum)

    def positions(self, x: Shape, g: Shape) -> int:
        """See `Site.positions`."""
        return prod(x[1:])

    def amplitude(self, x: Tensor, g: Tensor, positions: int) -> Tensor:
        """See `Site.amplitude`; by the inequality of Cauchy and Schwarz."""
        return g * positions**0.5

    def kind(self, x: Shape, g: Shape) -> Hashable:
        """See `Site.kind`."""
        return "embedding", self.padding

    def joined(self, uses: Sequence[tuple[Tensor, Tensor]], batch: int) -> tuple[Site, Tensor, Tensor]:
        """See `Site.joined`."""
        x = torch.cat([x.reshape(batch, -1) for x, _ in uses], 1)
        return self, x, torch.cat([g.reshape(batch, -1, g.shape[-1]) for _, g in uses], 1)

    def factors(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """See `Site.factors`."""
        return x.reshape(x.shape[0], -1), self._lines(x, g).reshape(x.shape[0], -1, g.shape[-1])

    def apply(self, x: Tensor, parameter: Tensor) -> Tensor:
        """See `Site.apply`."""
        y = F.embedding(x, parameter)
        return y if self.padding is None else y.masked_fill((x == self.padding)[..., None], 0)

    def _lines(self, x: Tensor, g: Tensor) -> Tensor:
        """One line of `g` for each token, zero for padding."""
        if self.padding is not None:
            g = g.masked_fill((x == self.padding)[..., None], 0)
        return g.flatten(0, -2)

    def _places(self, x: Tensor) -> Tensor:
        """Number each token of each example as if every example had a table of its own."""
        first = torch.arange(x.shape[0], device=x.device) * self.source.shape[0]
        return (x.reshape(x.shape[0], -1) + first[:, None]).flatten()

    def _scatter(self, x: Tensor, g: Tensor) -> Tensor:
        rows, width = self.source.shape
        table = g.new_zeros(x.shape[0] * rows, width)
        return table.index_add_(0, self._places(x), self._lines(x, g)).reshape(x.shape[0], rows, width)

    def _segments(self, x: Tensor, g: Tensor) -> Squares:
        """Add up the lines of equal tokens of one example, and only then square."""
        lines, places = self._lines(x, g), self._places(x)
        ordered, order = places.sort()
        new = ordered.diff(prepend=ordered[:1]) != 0  # a token that is not the one before it
        segment = torch.empty_like(places).index_copy_(0, order, new.cumsum(0))
        sums = torch.zeros_like(lines).index_add_(0, segment, lines)  # as many as if no token came twice
        example = torch.zeros_like(places).index_copy_(0, segment, places // self.source.shape[0])
        squares = torch.zeros(x.shape[0], dtype=torch.float64, device=g.device)
        terms = squared_norms(lines).reshape(x.shape[0], -1).sum(1)
        norms = squares.index_add_(0, example, squared_norms(sums))
        return Squares(norms, terms, torch.full_like(terms, x[0].numel()), terms)  # a token is a row of norm one

    def _sum(self, x: Tensor, g: Tensor) -> Tensor:
        return g.new_zeros(*self.source.shape).index_add_(0, x.flatten(), self._lines(x, g))


def embedding(
    trace: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rule of `F.embedding`."""
    if max_norm is not None or scale_grad_by_freq or not trace.is_batched(input) or not trace.is_parameter(weight):
        return NotImplemented
    if not input.numel() or not weight.numel():
        return NotImplemented
    padding = padding_idx + weight.shape[0] if padding_idx is not None and padding_idx < 0 else padding_idx

    def run(tokens: Tensor, tap: Tap) -> Tensor:
        return tap(F.embedding(tokens, weight.detach()), tokens, [EmbeddingWeight(weight, "embedding", padding)])

    return trace.record(run, input)


RULES: dict[Any, Rule] = {F.embedding: embedding}
