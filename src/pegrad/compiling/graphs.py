"""A recorded call, compiled: each stage by its own backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pegrad.compiling.backends import Backend, Runs
from pegrad.compiling.blocks import by_blocks
from pegrad.compiling.nodes import KIN
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.recording import Recording
from pegrad.compiling.stages import Staged
from pegrad.errors import ArgumentError
from pegrad.numerics import arithmetic, without_autocast

PLAIN = Backend("eager")
Backends = tuple[Backend, ...]
"""One for each stage, or one for all."""


def named(backends: Backends) -> str:
    """Return what backends are called: once, if they are the same."""
    return ", ".join(map(str, backends if len({*backends}) > 1 else backends[:1]))


@dataclass(frozen=True, eq=False)
class Graph:
    """A compiled graph for arguments of one kind."""

    runs: Runs
    recording: Recording
    strides: tuple[tuple[int, ...], ...]
    """Of the tensors that it was compiled for."""

    def __call__(self, inputs: Any) -> tuple[Any, bool]:
        """Run: the value, and whether what was assumed of the inputs holds, without which it is worth nothing."""
        tensors = Pieces.of(inputs)[1]
        given = [_laid(t, strides) for t, strides in zip(tensors, self.strides, strict=True)]
        with torch.no_grad(), arithmetic(given[0].device):
            *outputs, held = self.runs(*given, *self.recording.captured)
        return self.recording.value.filled(outputs), bool(held)


class Compiler:
    """Compiles a recorded call.

    Args:
        recording: the call.
        inputs: what it is compiled for.

    Attributes:
        stages: the numbers of its stages.
    """

    def __init__(self, recording: Recording, inputs: Any) -> None:
        self._recording = recording
        self._inputs = inputs
        self._device = Pieces.of(inputs)[1][0].device
        self._plain = by_blocks(recording.graph)
        self._staged: Staged = self._on(inputs, lambda *tensors: Staged(recording.graph, tensors))
        self.stages = range(len(self._staged.stages))

    def graph(self, backends: Backends) -> Graph:
        """Compile every stage. None is compiled twice by one backend.

        Raises:
            ArgumentError: there is no such backend.
            CompileError: one fails.
        """
        strides = tuple(t.stride() for t in Pieces.of(self._inputs)[1])
        if {*backends} == {PLAIN}:
            return Graph(self._plain, self._recording, strides)
        with without_autocast(self._device):  # whose casts are operations of the graph
            return Graph(self._staged.compiled(backends), self._recording, strides)

    def by_stage(self, backends: Backends) -> Backends:
        """Return a backend for each stage.

        Raises:
            ArgumentError: there are some, and not as many as stages.
        """
        many = len(self.stages)
        if len(backends) == 1:
            return backends * many
        if len(backends) != many:
            raise ArgumentError(f"Expected one backend, or one for each stage, {many} in all, got {len(backends)}")
        return backends

    def written_parts(self, stage: int) -> int:
        """Return how often a stage writes to a part of a tensor."""
        return self._staged.stages[stage].written_parts

    def ways(self, stage: int, backends: Sequence[Backend]) -> dict[Backend, Callable[[], Any]]:
        """Return what runs a stage by itself, by each of some backends, on what it was compiled for."""
        return {backend: partial(self._run, self._staged.alone(stage, backend)) for backend in backends}

    def _run(self, alone: Callable[[], Any]) -> None:
        with torch.no_grad(), arithmetic(self._device):
            alone()

    def outputs(self, stage: int, backend: Backend, inputs: Any) -> tuple[Any, ...]:
        """Run the graph, the last of it by a backend, up to where a stage ends.

        Returns:
            What that stage gives: a list of what is of one kind, and all else.
        """
        with without_autocast(self._device):
            values = self._on(inputs, lambda *tensors: self._staged.outputs(stage, backend, tensors))
        kin = [value for node, value in values.items() if KIN in node.meta]
        return kin, *(value for node, value in values.items() if KIN not in node.meta)

    def _on(self, inputs: Any, run: Callable[..., Any]) -> Any:
        """Run on copies, which may be overwritten."""
        with torch.no_grad(), arithmetic(self._device):
            return run(*(t.detach().clone() for t in Pieces.of(inputs)[1]), *self._recording.captured)


def _laid(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the numbers of a tensor, laid out in memory like those that the graph was compiled for."""
    plain = tensor.detach()
    if plain.stride() == strides:
        return plain
    return torch.empty_strided(plain.shape, strides, dtype=plain.dtype, device=plain.device).copy_(plain)
