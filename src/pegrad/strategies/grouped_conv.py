"""`grouped_conv`: `vmap(grad(loss))` with our own vjp rule for convolutions (the literature's `crb`)."""

from dataclasses import dataclass, replace

from torch import Tensor

from pegrad.errors import ArgumentError
from pegrad.problem import Leaves, Problem, Values
from pegrad.rules.conv import KERNELS, replacements
from pegrad.strategies.base import Stacking
from pegrad.strategies.vmap import Vmap
from pegrad.tracing.interception import Interception


@dataclass(frozen=True)
class GroupedConv(Stacking):
    """Vectorise the gradient of one example, convolutions following the grouped-convolution rule.

    Args:
        kernel: how a convolution's stacked weight gradient is computed, a key of `pegrad.KERNELS`; None picks the
            cheapest for each call by its shapes.

    Raises:
        ArgumentError: `kernel` is no such key.

    Source: Rochette, Manoel & Tramel 2019, Algorithms 1 and 2.
    """

    kernel: str | None = None

    def __post_init__(self) -> None:
        if self.kernel is not None and self.kernel not in KERNELS:
            raise ArgumentError(f"Expected kernel to be None or one of {sorted(KERNELS)}, got {self.kernel!r}")

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Stacking.stacked`."""
        table = replacements(self.kernel)

        def loss(params: Leaves, example: Leaves) -> tuple[Tensor, Leaves]:
            with Interception(table):
                return problem.loss(params, example)

        return Vmap().stacked(replace(problem, loss=loss))
