"""Put a function of ours in the place of one of PyTorch's, for as long as a block runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from pegrad.torch_internals import function_modes


class Interception(TorchFunctionMode):
    """Inside the block, calls of the table's keys run the table's values.

    Modules call the same functions as users do, so this reaches into any `nn.Module`; while a replacement runs, the
    interception is off, so it may call what it replaces. Nothing is patched: the mode is local to the thread.

    Args:
        table: PyTorch functions, and what to call instead with the same arguments.

    Attributes:
        raised: the errors that functions raised, whether or not the block caught them.
    """

    def __init__(self, table: Mapping[Callable, Callable]) -> None:
        super().__init__()
        self.table = table
        self.raised: list[Exception] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch in place of `func`."""
        try:
            return self.table.get(func, func)(*args, **(kwargs or {}))
        except Exception as error:
            self.note(error, func)
            raise

    def note(self, error: Exception, func: Callable) -> None:
        """Take note of an error that a function raised."""
        if not hasattr(error, "pegrad_operation"):
            error.pegrad_operation = getattr(func, "__name__", str(func))  # type: ignore[attr-defined]
        self.raised.append(error)


class Intercepted(TorchFunctionMode):
    """A mode that can have an interception in itself: two modes would see every call one after the other.

    A call that no function of the table takes the place of goes to `call`, with both of them off.

    Attributes:
        interception: what intercepts; None: nothing does. The outermost stays, for what the loss runs again.
    """

    interception: Interception | None = None

    def call(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in place of `func`."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch in place of `func`."""
        interception = self.interception
        if interception is None:
            return self.call(func, args, kwargs or {})
        self.interception = None
        try:
            replacement = interception.table.get(func)
            if replacement is None:
                return self.call(func, args, kwargs or {})
            with self:
                return replacement(*args, **(kwargs or {}))
        except Exception as error:
            interception.note(error, func)
            raise
        finally:
            self.interception = interception


@contextmanager
def on(interception: Interception) -> Iterator[None]:
    """Intercept inside the block, by the innermost mode itself where that is an `Intercepted`."""
    modes = function_modes()
    mode = modes[-1] if modes else None
    if not isinstance(mode, Intercepted):
        with interception:
            yield
        return
    around, mode.interception = mode.interception, interception
    try:
        yield
    finally:
        if around is not None:
            around.raised += interception.raised  # which it would have seen as well, had it been a mode
            mode.interception = around
