"""How a graph becomes a function, by the compilers that PyTorch knows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pegrad.errors import ArgumentError, CompileError

Runs = Callable[..., Sequence[Tensor]]
"""From tensors to tensors."""


class Backend(NamedTuple):
    """A compiler, and what is switched off in it."""

    name: str
    """A key of `torch._dynamo.list_backends`: `inductor`, `aot_eager`, `cudagraphs`, ...; `eager` runs the graph as it
    is, operation by operation."""
    without: tuple[str, ...] = ()
    """Settings of Inductor that are switched off."""

    def __str__(self) -> str:
        return self.name + "".join(f" without {setting}" for setting in self.without)

    def alternatives(self) -> "list[Backend]":
        """Return what to try next where this one makes a function that is wrong."""
        return [self._replace(without=(_PATTERNS,))] if self.name == "inductor" and not self.without else []

    def __call__(self, graph: GraphModule, tensors: Sequence[Tensor]) -> Runs:
        """Compile a graph for tensors of some shapes.

        Raises:
            ArgumentError: there is no such backend.
            CompileError: it fails.
        """
        if self.name == "eager":
            return graph
        from torch._dynamo import lookup_backend

        try:
            compile_graph = lookup_backend(self.name)
        except Exception as error:
            raise ArgumentError(f"Expected backend to be known to torch.compile, got {self.name!r}") from error
        try:
            with _settings(self), torch.no_grad():
                return compile_graph(graph, list(tensors))
        except Exception as error:
            raise CompileError(f"Backend {self} cannot compile the graph: {type(error).__name__} (above)") from error


_PATTERNS = "pattern_matcher"  # breaks graphs with attention on a CPU


@contextmanager
def _settings(backend: Backend) -> Iterator[None]:
    """Random numbers are torch's own, as they are eagerly; and what the backend is to do without is switched off."""
    if backend.name != "inductor":
        yield
        return
    from torch._inductor import config

    with config.patch({"fallback_random": True, **dict.fromkeys(backend.without, False)}):
        yield


def arguments_of(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Say what a graph was compiled for: shapes, dtypes, devices, and the surroundings that operations depend on."""
    looks = tuple((t.shape, t.dtype, t.device) for t in tensors)
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return looks, torch.get_default_dtype(), autocast
