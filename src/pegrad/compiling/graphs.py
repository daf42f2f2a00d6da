"""A recorded call, compiled: as a whole by one backend, or each stage by its own."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pegrad.compiling.backends import Backend, Runs
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.recording import Recording
from pegrad.compiling.stages import Staged
from pegrad.errors import ArgumentError
from pegrad.numerics import arithmetic, without_autocast

PLAIN = Backend("eager")
Backends = tuple[Backend, ...]
"""One for the whole graph, or one for each of its stages."""


def named(backends: Backends) -> str:
    """Return what backends are called: once, if they are the same."""
    return ", ".join(map(str, backends if len({*backends}) > 1 else backends[:1]))


def alternatives(backends: Backends) -> list[Backends]:
    """Return what to try next where these make a function that is wrong."""
    return [
        (*backends[:number], other, *backends[number + 1 :])
        for number, backend in enumerate(backends)
        for other in backend.alternatives()
    ]


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
    """

    def __init__(self, recording: Recording, inputs: Any) -> None:
        self._recording = recording
        self._tensors = [t.detach() for t in Pieces.of(inputs)[1]]

    def graph(self, backends: Backends) -> Graph:
        """Compile by one backend as a whole, or by several stage by stage.

        Raises:
            ArgumentError: there is no such backend, or not as many stages.
            CompileError: one fails.
        """
        if 1 < len(backends) != len(self._staged.stages):
            many = len(self._staged.stages)
            raise ArgumentError(f"Expected one backend, or one for each stage, {many} in all, got {len(backends)}")
        with without_autocast(self._tensors[0].device):  # whose casts are operations of the graph
            if len(backends) == 1:
                runs = backends[0](self._recording.graph, [*self._tensors, *self._recording.captured])
            else:
                runs = self._staged.compiled(backends)
        return Graph(runs, self._recording, tuple(t.stride() for t in self._tensors))

    def stages_with_written_parts(self, many: int) -> list[int]:
        """Return the numbers of the stages that write more often than that to parts of tensors."""
        return [number for number, stage in enumerate(self._staged.stages) if stage.written_parts > many]

    def one_by_one(self, backend: Backend, without: Collection[int]) -> list[Backends]:
        """Return how one stage after the other is compiled by a backend, the others run as they are."""
        plain = (PLAIN,) * len(self._staged.stages)
        each = [number for number in range(len(plain)) if number not in without]
        return [(*plain[:number], backend, *plain[number + 1 :]) for number in each]

    def together(self, found: Mapping[Backends, Graph]) -> list[Backends]:
        """Return what was found for single stages as one, if there is more than one stage to which that applies."""
        by_stage = zip(*(backends for backends in found if len(backends) > 1), strict=True)
        best = [next((backend for backend in tried if backend != PLAIN), PLAIN) for tried in by_stage]
        return [tuple(best)] if sum(backend != PLAIN for backend in best) > 1 else []

    @cached_property
    def _staged(self) -> Staged:
        with torch.no_grad(), arithmetic(self._tensors[0].device):
            return Staged(self._recording.graph, [*(t.clone() for t in self._tensors), *self._recording.captured])


def _laid(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the numbers of a tensor, laid out in memory like those that the graph was compiled for."""
    plain = tensor.detach()
    if plain.stride() == strides:
        return plain
    return torch.empty_strided(plain.shape, strides, dtype=plain.dtype, device=plain.device).copy_(plain)
