"""`ghost`: norms in a first backward pass, the clipped sum in a second; the memory of ordinary training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pegrad.strategies.base import Leaves, Problem, Values, bad_rows
from pegrad.strategies.book import Norms, gather, native_sum, widen, wipe
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.strategies.traced import Traced, values
from pegrad.tracing.trace import Tapped


@dataclass(frozen=True)
class Ghost(Traced):
    """Find the norms site by site, keep nothing, and run backward again from the weighted losses.

    Where the loss has a backward function that is not linear, so that weights do not pass through it, the second pass
    disagrees with the first, and `BookKeeping` takes the call over.

    Source: Li et al. 2022 (ghost clipping); Bu, Mao & Xu 2022 (mixed ghost clipping: the choice at every site).
    """

    def weighted_sum(self, problem: Problem, weigh: Callable[[Tensor], Tensor]) -> tuple[Leaves, Tensor, Values]:
        """See `Strategy.weighted_sum`."""
        trace, book = self.run(problem, partial(Norms, choose=self.choose_norm, keep=False), last=False)
        squares = book.squared_norms()
        weights = weigh(squares)
        bad = bad_rows(squares, weights)
        totals: list[tuple[Tensor, Tensor]] = []

        def receive(tapped: Tapped, x: Tensor, g: Tensor) -> None:
            x, g = wipe(widen(x), bad), wipe(widen(g), bad)
            totals.extend((site.source, native_sum(site, x, g)) for site in tapped.sites)

        copies, _ = trace.backward(weights.to(trace.losses.dtype), receive)
        if not trace.proportional():
            return BookKeeping(self.rules, self.timings).weighted_sum(problem, weigh)
        for copy, grad in zip(trace.copies, copies, strict=True):
            totals.append((copy.source, wipe(widen(grad), bad).sum(0)))
        return gather(trace, totals), squares, values(trace)
