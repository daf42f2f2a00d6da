"""A call as a graph: recorded, compiled, compared with the call itself, and measured against it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import Any, TypeVar

import torch

from pegrad.compiling.backends import Backend
from pegrad.compiling.graphs import PLAIN, Backends, Compiler, Graph, named
from pegrad.compiling.programs import Call, Program
from pegrad.compiling.recording import record
from pegrad.compiling.trials import Trials, copies, repeated
from pegrad.errors import CompileError

K = TypeVar("K")

EAGERLY = "eagerly"
_FAST = Backend("inductor")
_MANY = 500  # parts of tensors that a stage writes to, as the steps of a recurrent network do
_TOO_MANY = "it takes very long where so many parts of tensors are written to"
_ROUNDS = 7  # of each candidate, before one is preferred
_CLOSE = 1.03  # times as long: no difference that so few rounds could tell


@dataclass(frozen=True)
class CompileReport:
    """How a call was compiled, for arguments of one kind."""

    backend: str
    """What calls are made by, as `compile` takes it; or `eagerly`: no graph was faster by more than 3%."""
    operations: int
    """In the graph."""
    seconds: Mapping[str, float]
    """Of a call, median: `eagerly`, and by the graph, each part by what is fastest for it. Empty where a backend was
    asked for."""
    parts: tuple[Mapping[str, float], ...]
    """Of each part by itself, by each backend: a step's gradient, and its noise and update. Empty where there was no
    choice."""
    spent: float
    """Seconds that recording, compiling and comparing took."""
    rejected: tuple[str, ...]
    """What failed or gave something else than the call, and is not used."""

    @property
    def pays_after(self) -> float:
        """After how many calls the time spent is won back; infinite where nothing is known to be faster."""
        won = self.seconds[EAGERLY] - self.seconds[self.backend] if self.seconds else 0.0
        return self.spent / won if won > 0 else inf


def make(program: Program, call: Call, backends: Backends | None) -> tuple[Graph | None, CompileReport]:
    """Record a call, compile it, and compare.

    Args:
        program: what to compile.
        call: the arguments.
        backends: the compilers. None: whatever is fastest, which may be no graph at all.

    Returns:
        The graph, or None if calls had better be made eagerly; and how that came about.

    Raises:
        UnusualError: the graph is not good for these very arguments.
        CompileError: the call cannot be recorded, or the backend that was asked for fails or gives something else.
    """
    begun = time.perf_counter()
    inputs = program.inputs(call)
    with repeated() as again:
        with program.surroundings(call):
            recording = record(program.graph, copies(inputs) if program.handed_over else inputs, program.handed_over)
        compiler = Compiler(recording, inputs)
        again()
        trials = Trials(program, call, inputs, compiler.graph((PLAIN,)), again)
        by_stage, rejected = _found(compiler, trials, backends)
        spent = time.perf_counter() - begun
        if backends and not (by_stage and all(by_stage)):
            raise CompileError("The call cannot be compiled. " + ". ".join(rejected))
        again()
        with program.surroundings(call):
            parts = [_seconds(compiler.ways(stage, some)) if some[1:] else {} for stage, some in enumerate(by_stage)]
        chosen = tuple(preferred(found) if found else some[0] for found, some in zip(parts, by_stage, strict=True))
        graph = compiler.graph(chosen) if chosen else None
        again()
        seconds = {} if backends else _seconds(_ways(program, call, graph, named(chosen)))
    best = preferred(seconds) if seconds else named(chosen)
    by_name = tuple({str(backend): found for backend, found in part.items()} for part in parts)
    report = CompileReport(best, recording.operations, seconds, by_name, spent, tuple(rejected))
    return None if best == EAGERLY else graph, report


def preferred(seconds: Mapping[K, float]) -> K:
    """Return the first that takes as long as the fastest, or hardly longer.

    A graph as it is has the call's own bits, and what a compiler does to a gradient may need more memory.

    Args:
        seconds: by each, what is preferred first.
    """
    fastest = min(seconds.values())
    return next(name for name, found in seconds.items() if found <= _CLOSE * fastest)


def _found(compiler: Compiler, trials: Trials, backends: Backends | None) -> tuple[list[list[Backend]], list[str]]:
    """Return for each stage the backends by which it gives the same as the call, and say why others are not used.

    There is no stage where the graph gives something else, as it is.
    """
    distance = trials.distance(compiler.graph((PLAIN,)))
    if distance > 1:
        return [], [f"The graph gives something else, by {distance:.2g} times what passes for rounding"]
    rejected: list[str] = []
    by_stage: list[list[Backend]] = []
    asked = compiler.by_stage(backends) if backends else ()
    for stage in compiler.stages:
        candidates = [asked[stage] if asked else _FAST]
        if not asked and compiler.written_parts(stage) > _MANY:
            rejected.append(f"{candidates.pop()} is not tried on stage {stage}: {_TOO_MANY}")
        passed = [PLAIN] if not asked or asked[stage] == PLAIN else []  # the graph as it is has passed
        candidates = [backend for backend in candidates if backend != PLAIN]
        by_stage.append(passed + _passing(compiler, trials, stage, candidates, rejected))
    return by_stage, rejected


def _passing(
    compiler: Compiler, trials: Trials, stage: int, candidates: list[Backend], rejected: list[str]
) -> list[Backend]:
    """Return the backends by which a stage gives what it should, and say why it is not the others."""
    passed = []
    while candidates:
        backend = candidates.pop(0)
        try:
            distance = trials.distance_at(stage, backend, compiler)
        except CompileError as error:
            rejected.append(f"{error}, stage {stage}")
            continue
        if distance <= 1:
            passed.append(backend)
        else:
            rejected.append(
                f"{backend} gives something else on stage {stage}, by {distance:.2g} times what passes for rounding"
            )
            candidates[:0] = backend.alternatives()
    return passed


def run(program: Program, call: Call, inputs: Any, graph: Graph) -> tuple[Any, bool]:
    """Make a call by its graph: the result, and whether that holds."""
    with program.surroundings(call):
        value, held = graph(inputs)
    return program.result(call, value) if held else None, held


def _ways(program: Program, call: Call, graph: Graph | None, name: str) -> dict[str, Callable[[], Any]]:
    """Return ways to make a call: eagerly, and by the graph, if there is one, which alone takes memory handed over."""
    call = Call(*copies(call)) if program.handed_over else call  # which the graph goes on from
    eagerly: dict[str, Callable[[], Any]] = {EAGERLY: lambda: program.eagerly(call)}
    if graph is None:
        return eagerly
    by_graph: dict[str, Callable[[], Any]] = {name: partial(_run_anew, program, call, graph)}
    return by_graph | eagerly if program.handed_over else eagerly | by_graph


def _seconds(ways: Mapping[K, Callable[[], Any]]) -> dict[K, float]:
    """Measure ways to the same, in turns."""
    times: dict[K, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            _synchronise()
            times[name].append(time.perf_counter() - begun)
    return {name: median(found) for name, found in times.items()}


def _run_anew(program: Program, call: Call, graph: Graph) -> None:
    run(program, call, program.inputs(call), graph)


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
