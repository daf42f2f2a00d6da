"""What a reduction is: what becomes of a batch's per-example gradients, and what receives a backward pass for it."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from torch import Tensor

from pegrad.plan.plan import Choose
from pegrad.problem import Leaves, Problem
from pegrad.tracing.taps import Tapped
from pegrad.tracing.trace import Trace


class Receiver(Protocol):
    """What receives a backward pass."""

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """Enter one tapped operation: its input and the gradient at its output."""

    def receive_copies(self, grads: list[Tensor]) -> None:
        """Enter, last of all, the stacked gradients of the parameters of which each example had a copy."""


class Answering(Receiver, Protocol):
    """A receiver that has an answer, once all is entered."""

    def answer(self) -> Leaves:
        """Return what the backward pass came to."""


class Reduction(ABC):
    """What the per-example gradients of a batch are turned into: a list of tensors."""

    by_example: ClassVar[bool] = True
    """Whether each tensor of the answer has a row for each example."""

    @abstractmethod
    def of_stacked(self, grads: Leaves, problem: Problem) -> Leaves:
        """Reduce stacked gradients, for each leaf one tensor `(B, *leaf.shape)`."""

    @abstractmethod
    def receiver(self, trace: Trace, problem: Problem, choose: Choose) -> Answering:
        """Make what receives a backward pass.

        Args:
            trace: the trace that will be run backward.
            problem: what it is the trace of.
            choose: how norms are found.
        """
