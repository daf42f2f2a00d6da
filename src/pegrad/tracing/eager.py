"""Run a function as plain eager PyTorch, whatever the call is surrounded by or the loss has compiled."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from pegrad.torch_internals import DYNAMO
from pegrad.tracing.generators import Generators

F = TypeVar("F", bound=Callable[..., Any])

_REASON = "pegrad looks at every operation of the loss while it runs, which a compiled graph would hide from it"


def eager(function: F) -> F:
    """Decorate an entry function: it runs outside `torch.compile` and `torch.inference_mode`.

    A function that is compiled around a call breaks its graph at the call. A function that the loss has compiled runs
    as it was written. Both would otherwise be traced by dynamo, which replays operations, but not what pegrad notes
    while they run: the gradients would come out as zero. In inference mode autograd records nothing at all.

    Nothing of this is paid for before `torch._dynamo` has been imported, by whoever compiles something.
    """
    once = outermost(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if DYNAMO in sys.modules:
            return once(*args, **kwargs)
        generators = Generators.now()
        result = once(*args, **kwargs)
        if DYNAMO in sys.modules:  # the loss itself may just have compiled something, and not been seen whole
            generators.restore()
            return once(*args, **kwargs)
        return result

    return run  # type: ignore[return-value]


def outermost(function: F) -> F:
    """Decorate a function that calls entry functions: as `eager`, but it never runs twice.

    What it is given may be there only once, as the batches of a loader are. It must not run a loss by itself.
    """
    apart: Callable[..., Any] | None = None

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal apart
        if DYNAMO not in sys.modules:
            return recorded(*args, **kwargs)
        if apart is None:
            apart = torch.compiler.disable(compiled_eagerly, reason=_REASON)
        return apart(*args, **kwargs)

    def compiled_eagerly(*args: Any, **kwargs: Any) -> Any:
        with _forced_eager():
            return recorded(*args, **kwargs)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def generator_states() -> Generators:
    """Return the states of torch's generators, which a loss that runs twice must find as they were."""
    return Generators.now()


def set_generator_states(states: Generators) -> None:
    """Put torch's generators back into states that `generator_states` returned."""
    states.restore()


_lock = threading.Lock()
_depth = 0
_stance: Any = None


@contextmanager
def _forced_eager() -> Iterator[None]:
    """Let compiled functions run as they were written. The stance is the process's: the last thread out restores it."""
    global _depth, _stance
    with _lock:
        if _depth == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _stance.__exit__(None, None, None)
