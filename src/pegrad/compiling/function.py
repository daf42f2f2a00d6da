"""A call as a graph: recorded, compiled, compared with the call itself, and measured against it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad.compiling.backends import Backend, Runs
from pegrad.compiling.comparing import worst_difference
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.programs import Call, Program, Trial
from pegrad.compiling.recording import Recording, record
from pegrad.errors import CompileError
from pegrad.numerics import arithmetic, without_autocast
from pegrad.tracing.generators import Generators

EAGERLY = "eagerly"
_MANY = 500  # parts of tensors that a graph writes to, as the steps of a recurrent network do
_ROUNDS = 5  # of each candidate, before one is preferred


class UnusualError(CompileError):
    """The arguments that a call was recorded with are not ones that its graph is good for."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A compiled graph for arguments of one kind."""

    runs: Runs
    recording: Recording
    strides: tuple[tuple[int, ...], ...]
    """Of the tensors that it was compiled for."""

    @classmethod
    def of(cls, backend: Backend, recording: Recording, inputs: Any) -> "Graph":
        """Compile a recorded call.

        Raises:
            ArgumentError: there is no such backend.
            CompileError: it fails.
        """
        tensors = Pieces.of(inputs)[1]
        with without_autocast(tensors[0].device):  # whose casts are operations of the graph
            runs = backend(recording.graph, [*(t.detach() for t in tensors), *recording.captured])
        return cls(runs, recording, tuple(t.stride() for t in tensors))

    def __call__(self, inputs: Any) -> tuple[Any, bool]:
        """Run: the value, and whether what was assumed of the inputs holds, without which it is worth nothing."""
        tensors = Pieces.of(inputs)[1]
        given = [_laid(t, strides) for t, strides in zip(tensors, self.strides, strict=True)]
        with torch.no_grad(), arithmetic(given[0].device):
            *outputs, held = self.runs(*given, *self.recording.captured)
        return self.recording.value.filled(outputs), bool(held)


@dataclass(frozen=True)
class CompileReport:
    """How a call was compiled, for arguments of one kind."""

    backend: str
    """What calls are made by, or `eagerly`: nothing was faster."""
    operations: int
    """In the graph."""
    seconds: Mapping[str, float]
    """Of a call, median: `eagerly`, and by each backend that was measured. Empty where a backend was asked for."""
    spent: float
    """Seconds that recording, compiling and comparing took."""
    rejected: tuple[str, ...]
    """What failed or gave something else than the call, and is not used."""

    @property
    def pays_after(self) -> float:
        """After how many calls the time spent is won back; infinite where nothing is known to be faster."""
        won = self.seconds[EAGERLY] - self.seconds[self.backend] if self.seconds else 0.0
        return self.spent / won if won > 0 else inf


def make(program: Program, call: Call, backend: Backend | None) -> tuple[Graph | None, CompileReport]:
    """Record a call, compile it, and compare.

    Args:
        program: what to compile.
        call: the arguments.
        backend: the compiler. None: whatever is fastest, which may be no graph at all.

    Returns:
        The graph, or None if calls had better be made eagerly; and how that came about.

    Raises:
        UnusualError: the graph is not good for these very arguments.
        CompileError: the call cannot be recorded, or the backend that was asked for fails or gives something else.
    """
    begun = time.perf_counter()
    inputs = program.inputs(call)
    with _repeated() as again:
        with program.surroundings(call):
            recording = record(program.graph, inputs, program.handed_over)
        expected = []
        again()
        plain = Graph.of(Backend("eager"), recording, inputs)
        with program.surroundings(call):
            if not plain(_copies(inputs))[1]:
                raise UnusualError(
                    "The example is one that no graph is for: a gradient of it is not finite, or must be made again in "
                    "float64 to be exact. Compile for another"
                )
            other = _moved(program, call, inputs, _other)
            trials = [*program.trials(call), *[other] * plain(_copies(other.inputs))[1]]
        for trial in trials:
            again()
            expected.append((trial.inputs, program.compared(trial.run())))
        passed: dict[str, Graph] = {}
        rejected: list[str] = []
        candidates = [backend] if backend else [Backend("eager"), Backend("inductor")]
        if backend is None and recording.written_parts > _MANY:
            rejected.append(f"{candidates.pop()} is not tried: it takes very long where so many parts are written to")
        while candidates:
            candidate = candidates.pop(0)
            try:
                graph = Graph.of(candidate, recording, inputs)
            except CompileError as error:
                rejected.append(str(error))
                continue
            worst = 0.0
            for given, wanted in expected:
                again()
                distance = _distance(program, call, graph, given, wanted)
                if 1 < distance < inf:  # Adam makes a whole step of a gradient that is nothing but rounding
                    again()
                    swayed = program.compared(_moved(program, call, given, _swayed).run())
                    again()
                    distance = _distance(program, call, graph, given, wanted, swayed)
                worst = max(worst, distance)
            if worst <= 1:
                passed[str(candidate)] = graph
            else:
                rejected.append(f"{candidate} gives something else, by {worst:.2g} times what would pass for rounding")
                candidates = candidate.alternatives() + candidates
        spent = time.perf_counter() - begun
        if backend and not passed:
            raise CompileError("The call cannot be compiled. " + ". ".join(rejected))
        again()
        seconds = {} if backend else _measured(program, call, passed)
    best = next(iter(passed)) if backend else min(seconds, key=seconds.__getitem__)
    return passed.get(best), CompileReport(best, recording.operations, seconds, spent, tuple(rejected))


@contextmanager
def _repeated() -> Iterator[Callable[[], None]]:
    """Inside the block, the function that it gives puts torch's generators back to where they were, as does its end."""
    start = Generators.now()
    try:
        yield start.restore
    finally:
        start.restore()


def _moved(program: Program, call: Call, inputs: Any, move: Callable[[Tensor], Tensor]) -> Trial:
    """Return a trial with other numbers."""
    structure, tensors = Pieces.of(inputs)
    other = structure.filled([move(t) for t in tensors])

    def run() -> Any:
        with program.surroundings(call), torch.no_grad():
            return program.result(call, program.graph(other))

    return Trial(other, run)


def _other(tensor: Tensor) -> Tensor:
    """Return a tensor of other numbers that are as good: a percent more here and less there, or in another order.

    What became a constant of a graph, and should not have, comes to light.
    """
    if tensor.is_floating_point():
        return tensor * (1 + _shares(tensor) / 64)
    return tensor.roll(1, 0) if tensor.dim() else tensor


def _swayed(tensor: Tensor) -> Tensor:
    """Return a tensor whose numbers differ in their last places."""
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + 8 * torch.finfo(tensor.dtype).eps * _shares(tensor))


def _shares(tensor: Tensor) -> Tensor:
    """Return numbers from -0.3 to 0.7, in the shape of a tensor."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return numbers.mul_(0.618).frac_().sub_(0.3).view(tensor.shape).to(tensor.dtype)


def _distance(program: Program, call: Call, graph: Graph, inputs: Any, wanted: Any, swayed: Any = None) -> float:
    """Run a graph, and measure how far its result is from another, over what passes for rounding."""
    with program.surroundings(call):
        value, held = graph(_copies(inputs) if program.handed_over else inputs)
    if not held:
        return inf
    return worst_difference(program.compared(program.result(call, value)), wanted, program.start(inputs), swayed)


def run(program: Program, call: Call, inputs: Any, graph: Graph) -> tuple[Any, bool]:
    """Make a call by its graph: the result, and whether that holds."""
    with program.surroundings(call):
        value, held = graph(inputs)
    return program.result(call, value) if held else None, held


def _measured(program: Program, call: Call, graphs: Mapping[str, Graph]) -> dict[str, float]:
    """Measure calls, eager ones and by each graph, in turns."""
    call = Call(*_copies(call)) if program.handed_over else call  # which the graphs go on from
    ways: dict[str, Callable[[], Any]] = {EAGERLY: lambda: program.eagerly(call)}
    for name, graph in graphs.items():
        ways[name] = partial(_run_anew, program, call, graph)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            _synchronise()
            times[name].append(time.perf_counter() - begun)
    return {name: median(found) for name, found in times.items()}


def _run_anew(program: Program, call: Call, graph: Graph) -> None:
    run(program, call, program.inputs(call), graph)


def _copies(tree: Any) -> Any:
    return trees.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _laid(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the numbers of a tensor, laid out in memory like those that the graph was compiled for."""
    plain = tensor.detach()
    if plain.stride() == strides:
        return plain
    return torch.empty_strided(plain.shape, strides, dtype=plain.dtype, device=plain.device).copy_(plain)
