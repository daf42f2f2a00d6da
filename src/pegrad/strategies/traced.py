"""What `ghost` and `book_keeping` share: a traced forward pass, run backward to a reduction."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeVar

from torch import Tensor

from pegrad.errors import ArgumentError
from pegrad.numerics import arithmetic, full_precision, without_autocast
from pegrad.plan.candidates import Choices, Timings
from pegrad.plan.plan import Choose
from pegrad.problem import Leaves, Problem, Values
from pegrad.reductions.base import Receiver, Reduction
from pegrad.rules import RULES
from pegrad.rules.site import Rule
from pegrad.strategies.base import Strategy
from pegrad.torch_internals import transformed
from pegrad.tracing.taps import Tapped
from pegrad.tracing.trace import Trace

R = TypeVar("R", bound=Receiver)


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

    def reduce(self, problem: Problem, reduction: Reduction) -> tuple[Leaves, Values]:
        """See `Strategy.reduce`."""
        trace, receiver = self.run(problem, lambda trace: reduction.receiver(trace, problem, self.choose_norm))
        with arithmetic(problem.device):
            return receiver.answer(), values(trace)

    def run(self, problem: Problem, make: Callable[[Trace], R], *, last: bool = True) -> tuple[Trace, R]:
        """Trace the loss and run it backward to a receiver.

        Args:
            problem: loss, parameters and batch.
            make: makes the receiver from the trace, before the backward pass.
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
            receiver = make(trace)
            leaked = self.run_back(problem, trace, receiver, last=last)
            if not leaked:
                return trace, receiver
            apart |= leaked  # the loss uses them in a way that the trace cannot see

    @staticmethod
    def run_back(
        problem: Problem, trace: Trace, receiver: Receiver, *, last: bool = True, at: Tensor | None = None
    ) -> set[int]:
        """Run a trace backward to a receiver; if that is not the whole of it, return the leaves that it misses."""

        def receive(tapped: Tapped, x: Tensor, g: Tensor) -> None:
            with full_precision():
                receiver.receive(tapped, x, g)

        with without_autocast(problem.device):
            copies, leaks = trace.backward(receive, last=last, at=at)
            leaked = {i for i, leaks_here in enumerate(leaks) if leaks_here}
            if not leaked:
                with full_precision():
                    receiver.receive_copies(copies)
        return leaked

    def trace(self, problem: Problem, apart: Collection[int] = ()) -> Trace:
        """Run the loss forward; of the leaves in `apart` each example gets a copy."""
        return Trace(problem.loss, problem.params, problem.batch, {**RULES, **self.rules}, apart, problem.mask)

    @cached_property
    def choose(self) -> Choose:
        """Picks the way to the norms and the weighted sum of one parameter's gradients."""
        return Choices(self.timings, keep=self.keeps)

    @cached_property
    def choose_norm(self) -> Choose:
        """Picks the way to the norms, where no sum is asked for."""
        return Choices(self.timings, keep=False)


def values(trace: Trace) -> Values:
    """Return what the forward pass gave, cut off from the graph."""
    return Values(trace.losses.detach(), trace.aux)
