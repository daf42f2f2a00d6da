"""What surrounds a piece of a loss while it runs, and how to run it again under the same later on.

A backward pass starts when the loss has returned: transforms and modes are over, `functional_call` has given the module
its own weights back, and random numbers have been drawn. What runs again then must find all of it as it was.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pegrad.errors import LossError
from pegrad.torch_internals import entered, function_modes, level, vmaps
from pegrad.tracing.eager import generator_states, set_generator_states
from pegrad.tracing.trace import Trace


class Surroundings:
    """What surrounds a call at the moment when this is made.

    Args:
        function: what is called. The modules that it reaches are remembered with the tensors that they hold now.
        arguments: the arguments of the call.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._vmaps = vmaps()
        self._modes = [_reference(mode) for mode in function_modes()]
        self._generators = generator_states()
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        self._autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices]
        reached = [module for root in modules_in(function, *arguments) for module in root.modules()]
        self._held = [(m, dict(m._parameters), dict(m._buffers)) for m in dict.fromkeys(reached)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run a block as if it stood where this was made."""
        with ExitStack() as stack:
            stack.callback(set_generator_states, generator_states())
            set_generator_states(self._generators)
            if level() is None:
                for batch, randomness in self._vmaps:
                    stack.enter_context(entered(batch, randomness))
            elif vmaps() != self._vmaps:
                raise LossError(
                    "A backward pass under a transform of torch.func meets what pegrad.checkpoint ran under another: "
                    "call the function itself there"
                )
            present = function_modes()
            for reference in self._modes:
                mode = reference()
                if mode is not None and not any(mode is other for other in present):
                    stack.enter_context(mode)
            for device, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            for module, parameters, buffers in self._held:
                stack.enter_context(_holding(module, parameters, buffers))
            yield


def _reference(mode: TorchFunctionMode) -> Callable[[], TorchFunctionMode | None]:
    # A trace holds the graph that holds these surroundings: the circle would keep all activations alive. It is there
    # for as long as a backward pass runs.
    return weakref.ref(mode) if isinstance(mode, Trace) else lambda: mode


@contextmanager
def _holding(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> Iterator[None]:
    own = module._parameters, module._buffers
    module.__dict__.update(_parameters=parameters, _buffers=buffers)
    try:
        yield
    finally:
        module.__dict__.update(_parameters=own[0], _buffers=own[1])


def modules_in(*roots: Any) -> list[nn.Module]:
    """Find the modules that functions may call: as they are, bound, in partial calls, closures, globals, containers."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found.append(item)
        elif isinstance(item, functools.partial):
            stack += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, MethodType):
            stack += [item.__self__, item.__func__]
            stack += getattr(item.__self__, "__dict__", {}).values()
        elif isinstance(item, FunctionType):
            stack += _reached(item)
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
        elif isinstance(item, Mapping):
            stack += item.values()
    return found


def _reached(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    for name in function.__code__.co_names:
        item = function.__globals__.get(name)
        if isinstance(item, nn.Module | FunctionType | functools.partial):
            yield item
