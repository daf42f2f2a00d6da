"""Put a function of ours in the place of one of PyTorch's, for as long as a block runs."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


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
            if not hasattr(error, "pegrad_operation"):
                error.pegrad_operation = getattr(func, "__name__", str(func))  # type: ignore[attr-defined]
            self.raised.append(error)
            raise
