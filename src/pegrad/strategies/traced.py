"""What `ghost` and `book_keeping` share: a traced forward pass, run backward to a book."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeVar

from torch import Tensor

from pegrad.errors import ArgumentError
from pegrad.numerics import full_precision, without_autocast
from pegrad.rules import RULES
from pegrad.rules.site import Rule, Site
from pegrad.strategies.base import Leaves, Problem, Strategy, Values
from pegrad.strategies.book import Book, Norms, Stacks
from pegrad.strategies.choice import Candidate, Timings, choose
from pegrad.tracing.batched import transformed
from pegrad.tracing.trace import Tapped, Trace

B = TypeVar("B", bound=Book)


@dataclass(frozen=True)
class Traced(Strategy):
    """A strategy that finds norms site by site. Its values are constants to any further differentiation.

    Args:
        rules: rules of one's own, function to rule, beside `pegrad.RULES` or in their place.
        timings: measured times of kernels, of `pegrad.autotune`; what is not among them is estimated.

    Raises:
        ArgumentError: on a call, under a transform of torch.func.
    """

    rules: Mapping[Callable, Rule] = field(default_factory=dict)
    timings: Timings = field(default_factory=dict)
    keeps: ClassVar[bool] = False

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Strategy.stacked`."""
        found: dict[int, Tensor] = {}
        trace, _ = self.run(problem, partial(Stacks, visit=found.__setitem__))
        batch = problem.batch_size
        grads = [
            found[i].to(leaf.dtype) if i in found else leaf.new_zeros(batch, *leaf.shape)
            for i, leaf in enumerate(problem.params)
        ]
        return grads, values(trace)

    def squared_norms(self, problem: Problem) -> tuple[Tensor, Values]:
        """See `Strategy.squared_norms`."""
        trace, book = self.run(problem, partial(Norms, choose=self.choose_norm, keep=False))
        return book.squared_norms(), values(trace)

    def run(self, problem: Problem, make_book: Callable[[Trace], B], *, last: bool = True) -> tuple[Trace, B]:
        """Trace the loss and run it backward to a book.

        Args:
            problem: loss, parameters and batch.
            make_book: makes the book from the trace, before the backward pass.
            last: whether the graph may be freed.
        """
        if transformed():
            raise ArgumentError(
                f"Strategy {type(self).__name__} cannot run under a transform of torch.func (grad, vmap, jvp, ...): "
                "use strategy='grouped_conv' there, or 'auto', which knows"
            )
        apart: set[int] = set()
        while True:
            trace = self.trace(problem, apart)
            if opaque := trace.opaque() - apart:
                apart |= opaque
                continue
            book = make_book(trace)
            leaked = self.run_back(problem, trace, book, last=last)
            if not leaked:
                return trace, book
            apart |= leaked  # the loss uses them in a way that the trace cannot see

    @staticmethod
    def run_back(problem: Problem, trace: Trace, book: Book, *, last: bool = True) -> set[int]:
        """Run a trace backward to a book; if that is not the whole of it, return the leaves that it misses."""

        def receive(tapped: Tapped, x: Tensor, g: Tensor) -> None:
            with full_precision():
                book.receive(tapped, x, g)

        with without_autocast(problem.device):
            copies, leaks = trace.backward(receive, last=last)
            leaked = {i for i, leaks_here in enumerate(leaks) if leaks_here}
            if not leaked:
                with full_precision():
                    book.receive_copies(copies)
        return leaked

    def trace(self, problem: Problem, apart: Collection[int] = ()) -> Trace:
        """Run the loss forward; of the leaves in `apart` each example gets a copy."""
        return Trace(problem.loss, problem.params, problem.batch, {**RULES, **self.rules}, apart, problem.mask)

    def choose(self, site: Site, tapped: Tapped) -> Candidate:
        """Pick the way to a site's norms and weighted sum."""
        return choose(site, tapped.x, tapped.y, self.timings, keep=self.keeps)

    def choose_norm(self, site: Site, tapped: Tapped) -> Candidate:
        """Pick the way to a site's norms, where no sum is asked for."""
        return choose(site, tapped.x, tapped.y, self.timings, keep=False)


def values(trace: Trace) -> Values:
    """Return what the forward pass gave, cut off from the graph."""
    return Values(trace.losses.detach(), trace.aux)
