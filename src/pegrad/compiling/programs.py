"""What is compiled: a call, as a function from tensors to tensors with a little Python before and after it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from pegrad.compiling.recording import Handed


class Call(NamedTuple):
    """Arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trial(NamedTuple):
    """Inputs of the graph, and what it must give, but for rounding."""

    inputs: Any
    run: Callable[[], Any]
    """Gives the result without the graph."""


class Program(Protocol):
    """A call that can be compiled."""

    @property
    def handed_over(self) -> tuple[Handed, Handed] | None:
        """See `pegrad.compiling.recording.record`."""

    def eagerly(self, call: Call) -> Any:
        """Make the call without any graph."""

    def inputs(self, call: Call) -> Any:
        """Return what the graph is a function of: a pytree."""

    def graph(self, inputs: Any) -> Any:
        """Run what becomes the graph: from tensors to tensors, pure. What else is in the pytrees becomes part of it."""

    def result(self, call: Call, value: Any) -> Any:
        """Make the call's result of what the graph gave."""

    def surroundings(self, call: Call) -> AbstractContextManager[Any]:
        """What the graph runs in."""

    def compared(self, result: Any) -> Any:
        """Return what of a result is compared."""

    def start(self, inputs: Any) -> Any:
        """Return where that started from: see `pegrad.compiling.comparing`."""

    def trials(self, call: Call) -> Iterator[Trial]:
        """Yield what the graph is to be compared with, once it is made."""


class Function:
    """A pure function of pytrees."""

    handed_over: tuple[Handed, Handed] | None = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def eagerly(self, call: Call) -> Any:
        """See `Program.eagerly`."""
        return self.function(*call.args, **call.kwargs)

    def inputs(self, call: Call) -> Any:
        """See `Program.inputs`."""
        return call

    def graph(self, inputs: Any) -> Any:
        """See `Program.graph`."""
        return self.function(*inputs.args, **inputs.kwargs)

    def result(self, call: Call, value: Any) -> Any:
        """See `Program.result`."""
        return value

    def surroundings(self, call: Call) -> AbstractContextManager[Any]:
        """See `Program.surroundings`."""
        return nullcontext()

    def compared(self, result: Any) -> Any:
        """See `Program.compared`."""
        return result

    def start(self, inputs: Any) -> None:
        """See `Program.start`."""

    def trials(self, call: Call) -> Iterator[Trial]:
        """See `Program.trials`."""
        yield Trial(call, lambda: self.eagerly(call))
