"""How a graph becomes a function, by the compilers that PyTorch knows."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pegrad.compiling.blocks import by_blocks, compiled_by_blocks
from pegrad.compiling.lstm import by_kernel
from pegrad.errors import ArgumentError, CompileError
from pegrad.torch_internals import compiler, inductor_settings

Runs = Callable[..., Sequence[Tensor]]
"""From tensors to tensors."""


class Backend(NamedTuple):
    """A compiler, and what is switched off in it."""

    name: str
    """One that `torch.compile` knows: `inductor`, `aot_eager`, `cudagraphs`, ...; `eager` runs the graph as it
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
            return by_blocks(graph)
        try:
            compile_graph = compiler(self.name)
        except Exception as error:
            raise ArgumentError(f"Expected backend to be known to torch.compile, got {self.name!r}") from error

        def compile(graph: GraphModule, tensors: Sequence[Tensor]) -> Runs:
            try:
                with _settings(self), torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch's, of its own doings
                    given = by_kernel(graph, tensors) if self.name == "inductor" else graph
                    return compile_graph(given, list(tensors))
            except Exception as error:
                raise CompileError(
                    f"Backend {self} cannot compile the graph: {type(error).__name__} (above)"
                ) from error

        return compiled_by_blocks(graph, tensors, compile)


_PATTERNS = "pattern_matcher"  # breaks graphs with attention on a CPU


@contextmanager
def _settings(backend: Backend) -> Iterator[None]:
    """Random numbers are torch's own, as they are eagerly; and what the backend is to do without is switched off."""
    if backend.name != "inductor":
        yield
        return
    with inductor_settings({"fallback_random": True, **dict.fromkeys(backend.without, False)}):
        yield
