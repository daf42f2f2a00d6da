"""What every reduction is: a receiver of a backward pass."""

from typing import Protocol

from torch import Tensor

from pegrad.tracing.trace import Tapped


class Reduction(Protocol):
    """What receives a backward pass."""

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """Enter one tapped operation: its input and the gradient at its output."""

    def receive_copies(self, grads: list[Tensor]) -> None:
        """Enter, last of all, the stacked gradients of the parameters of which each example had a copy."""
