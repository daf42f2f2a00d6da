"""Run a function as plain eager PyTorch, whatever the call is surrounded by or the loss has compiled."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_REASON = "pegrad looks at every operation of the loss while it runs, which a compiled graph would hide from it"


def eager(function: F) -> F:
    """Decorate an entry function: it runs outside `torch.compile` and `torch.inference_mode`.

    A function that is compiled around a call breaks its graph at the call. A function that the loss has compiled runs
    as it was written. Both would otherwise be traced by dynamo, which replays operations, but not what pegrad notes
    while they run: the gradients would come out as zero. In inference mode autograd records nothing at all.

    Nothing of this is paid for before `torch._dynamo` has been imported, by whoever compiles something.
    """
    apart: list[Callable[..., Any]] = []

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            if not apart:
                apart.append(torch.compiler.disable(compiled_eagerly, reason=_REASON))
            return apart[0](*args, **kwargs)
        generators = generator_states()
        result = recorded(*args, **kwargs)
        if "torch._dynamo" in sys.modules:  # the loss itself may just have compiled something, and not been seen whole
            set_generator_states(generators)
            return run(*args, **kwargs)
        return result

    def compiled_eagerly(*args: Any, **kwargs: Any) -> Any:
        with _forced_eager():
            return recorded(*args, **kwargs)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def generator_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the states of torch's generators, which a loss that runs twice must find as they were."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_generator_states(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Put torch's generators back into states that `generator_states` returned."""
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


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
