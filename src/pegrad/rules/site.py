"""What a rule knows of one place where a parameter meets an operation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pegrad.numerics import by_example
from pegrad.rules.costs import Work, nanoseconds

Shape = tuple[int, ...]


class Kernel(NamedTuple):
    """One way to compute one thing from `x` and `g`, and what it costs."""

    rates: str
    """Key of the rates in `pegrad.rules.costs` that its work is charged at."""
    work: Work
    run: Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True, eq=False)
class Site(ABC):
    """One use of a parameter by an operation `y = f(x, parameter)` on the physical batch.

    A site answers from the operation's input `x` `(B, ...)` and the loss's gradient at its output, `g` `(B, ...)`.
    It must know how to stack gradients; what else it knows, it offers as further kernels. Those are used only if it
    bounds the terms that its gradients are sums of (`amplitude`), for otherwise nothing is known of their rounding.

    Args:
        source: the parameter, or what the loss made of parameters alone: a transpose, a cast, a normalised weight.
        operation: the operation's name, as `explain` shows it.
    """

    source: Tensor
    operation: str

    @property
    def bounded(self) -> bool:
        """Whether the site bounds the terms of its gradients: see `amplitude`."""
        return type(self).amplitude is not Site.amplitude

    def describe(self) -> str:
        """Say what the operation is, to tell sites of equal shapes apart."""
        return self.operation

    @abstractmethod
    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """Offer ways to the stacked gradient: `(x, g) -> (B, *source.shape)`, by name, for these shapes."""

    def norming(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """Offer ways to the squared norms that stack nothing, by name, for these shapes.

        Each is `(x, g) -> Squares`: the squared norms, and what tells how far rounding may have gone.
        """
        return {}

    def summing(self, x: Shape, g: Shape) -> Kernel | None:
        """Offer a native way to the gradient summed over the batch, `(x, g) -> source.shape`, if there is one."""
        return None

    def weigh(self, x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Give each example a weight, `(B,)`, in what `summing` sums: by way of `g`, in which every gradient is linear.

        A site whose gradient is linear in `x` as well may weigh that, where it is smaller.
        """
        return x, by_example(g, weights)

    def positions(self, x: Shape, g: Shape) -> int:
        """Count the terms that one example's gradient is the sum of."""
        return 1

    def amplitude(self, x: Tensor, g: Tensor, positions: int) -> Tensor | None:
        """Bound the sum of the norms of the terms of each example's gradient from above.

        Args:
            x: bounds on the norms of the input's rows, one or several an example, float64; ones for integers.
            g: the same of the gradient at the output.
            positions: how many terms there are.

        Returns:
            `(B,)`; or None: there is no bound, and `norming` and `summing` stay unused.
        """
        return None

    def rows_at_a_time(self, positions: int) -> int:
        """Say over how many examples `summing` may sum in one go: more would round more, at no gain in speed."""
        return 1 << 30

    def exact(self, x: Tensor, g: Tensor) -> Tensor:
        """Stack the gradients in float64, from float64 `x` and `g`."""
        kernels = self.stacking(tuple(x.shape), tuple(g.shape)).values()
        return min(kernels, key=lambda kernel: nanoseconds(kernel.rates, kernel.work, x.device.type)).run(x, g)

    def kind(self, x: Shape, g: Shape) -> Hashable | None:
        """Say what uses of one parameter must have in common to be taken for one use; None: this one cannot be.

        Args:
            x: shape of the input.
            g: shape of the gradient at the output.
        """
        return None

    def joined(self, uses: Sequence[tuple[Tensor, Tensor]], batch: int) -> "tuple[Site, Tensor, Tensor]":
        """Take several uses of this kind for one: a site, its input and the gradient at its output.

        Args:
            uses: `(x, g)` of each.
            batch: B.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it has a kind, but not how uses of it are joined")

    def turned(self, source: Tensor, x: Tensor, g: Tensor) -> "tuple[Site, Tensor, Tensor] | None":
        """Take a use of the transpose of a parameter for a use of the parameter, `source`, if that can be done."""
        return None

    def factors(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Write the gradients `(B, p, D)` as sums over positions of `left[t] ⊗ right[t]`, if they are such sums.

        Returns:
            `left` `(B, T, p)` and `right` `(B, T, D)`; integers `(B, T)` stand for unit vectors.
        """
        return None

    def apply(self, x: Tensor, parameter: Tensor) -> Tensor | None:
        """Run the operation, if it is linear in its parameter, with another one: the output, shaped like `g`."""
        return None

    def pairs(self, x: Tensor, g: Tensor) -> Tensor | None:
        """Return the inner products of the examples' gradients, `(B, B)`, where that is cheaper than stacking them.

        Where they are differences of large products, in float64.
        """
        return None


def weigh_the_smaller(x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`Site.weigh` of a site whose gradient is linear in `x` as well."""
    return (by_example(x, weights), g) if x.numel() < g.numel() else (x, by_example(g, weights))


Tap = Callable[[Tensor, Tensor, list[Site]], Tensor]
"""`(y, x, sites) -> y`: notes the sites of an operation whose input was `x` and whose output is `y`."""


class Send(Protocol):
    """Where an operation that was announced sends what its sites are asked about, from its own backward."""

    anchor: Tensor
    """A scalar that must be among the inputs of the operation's `autograd.Function`, or its backward might not run."""

    def __call__(self, x: Tensor, g: Tensor) -> None:
        """Send the input `(B, ...)` and the gradient at the output `(B, ...)`."""


class Recorder(Protocol):
    """What a rule may ask of the trace that called it."""

    def is_parameter(self, tensor: Any) -> bool:
        """Tell whether this is a parameter, or what the loss made of parameters alone."""

    def is_batched(self, tensor: Any) -> bool:
        """Tell whether this differs from example to example."""

    def record(self, run: Callable[[Tensor, Tap], Tensor], x: Tensor) -> Tensor:
        """Run an operation on the physical batch and note its sites.

        Args:
            run: `(x, tap) -> y`, `x` and `y` `(B, ...)`: runs the operation with its parameters detached, and passes
                its output through `tap`.
            x: the operation's input, batched.

        Returns:
            The output as the loss sees it.
        """

    def run(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Run an operation without parameters on the physical batch.

        Args:
            function: takes one tensor `(B, ...)` for each of `tensors`, and returns one, or a tuple of them.
            tensors: no parameters, and at least one of them batched.
        """

    def announce(self, sites: list[Site], x: Shape, y: Shape, dtype: torch.dtype) -> Send:
        """Note the sites of an operation that works out the gradient at its output itself, in a backward of its own.

        Args:
            sites: at least one.
            x: shape of the input that they will be asked about, physical.
            y: shape of the output, physical.
            dtype: of the input.
        """

    def expand(self, parameter: Tensor, witness: Tensor, operation: str = "") -> Tensor:
        """Give each example a copy of a parameter: right for any operation, cheap for small parameters.

        Args:
            parameter: a parameter.
            witness: any batched tensor.
            operation: what the copy is for.
        """


Rule = Callable[..., Any]
"""`(trace, *args, **kwargs)` of the function it is the rule of, to that function's value, or `NotImplemented`."""
