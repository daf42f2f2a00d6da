"""What a piece of a loss did with parameters, so that running it again makes nothing anew, and does the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.autograd.graph import saved_tensors_hooks

from pegrad.errors import LossError

T = TypeVar("T")


class Journal:
    """The uses of parameters in one run of a function: written the first time, read afterwards.

    What runs again and does otherwise (by a module that holds its own weights again, a counter, a cache) would make
    gradients of something else in silence: that is refused.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Any]] = []
        self._reading: Iterator[tuple[Any, Any]] | None = None
        self._differs = False

    @property
    def reading(self) -> bool:
        """Whether the function runs again."""
        return self._reading is not None

    def write(self, use: Any, value: Any) -> None:
        """Note a use, and what was made for it."""
        self._entries.append((use, value))

    def read(self, use: Any) -> Any:
        """Return what was made for a use when the function ran first.

        Raises:
            LossError: the first run did something else at this point.
        """
        assert self._reading is not None
        noted, value = next(self._reading, (None, None))
        if noted != use:
            self._differs = True
            raise _otherwise()
        return value

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside the block, the function runs again, from start to end.

        Raises:
            LossError: it did something else than the first time, or less.
        """
        self._reading = iter(self._entries)
        try:
            yield
            self._differs |= next(self._reading, None) is not None
        finally:
            self._reading = None
            if self._differs:  # an operator would have made a `TypeError` of its own of the one that `read` raised
                raise _otherwise()


def once(journals: list[Journal], use: Any, make: Callable[[], T]) -> T:
    """Make what a use of a parameter needs, or return what was made when the same function ran first.

    Args:
        journals: those of all functions that are running, the outermost first.
        use: what tells this use from others.
        make: makes it.
    """
    first = next((journal for journal in reversed(journals) if journal.reading), None)
    value = make() if first is None else first.read(use)
    for journal in journals:
        if not journal.reading:
            journal.write(use, value)
    return value


def kept() -> saved_tensors_hooks:
    """Inside the block, a graph saves what it needs as ever, whatever runs again around it.

    For what the loss makes of parameters alone: it is small, and gradients are pulled back through it many times.
    """
    return saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


def _otherwise() -> LossError:
    return LossError(
        "What pegrad.checkpoint runs again in the backward pass uses other parameters than it did in the forward pass. "
        "Does it call a module that it does not name, and that functional_call has given its own weights back? Pass "
        "the module, or its method, as the function or as an argument"
    )
