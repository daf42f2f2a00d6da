"""The whole step, with noise and update, against an ordinary one: eager, compiled, and what its parts take."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

import native
import peers
import pegrad
import report
from contest import CLIP_NORM
from isolation import FailedError, in_own_process, large_blocks_apart, peak
from pegrad import trees
from pegrad.papers.comparison import interleaved
from runner import Effort, Point, spread
from workloads import Task, Workload, cross_entropies

NOISE_MULTIPLIER = 1.1
COUNT_NOISE_MULTIPLIER = 10.0  # of adaptive clipping
LEARNING_RATE = 1e-3
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (torch.optim.SGD, pegrad.optim.sgd),
    "adam": (torch.optim.Adam, pegrad.optim.adam),
}
ORDINARY, ORDINARY_COMPILED = "non-private step", "non-private step, compiled"
PRIVATE, PRIVATE_COMPILED = "private step", "private step, compiled"
OPACUS = "private step of Opacus"
WITH_PARTS = ORDINARY, PRIVATE, "noise", "private update", "non-private update"
COMPILING = 900.0  # seconds that it may take
COMPILED = ORDINARY, ORDINARY_COMPILED, PRIVATE, PRIVATE_COMPILED, OPACUS


def whole_step(optimizer: str, workload: Workload, effort: Effort, device: str, names: Sequence[str]) -> Point:
    """Time steps, all in turns, in a process of its own, and measure the memory of each in another.

    Compilers find nothing that was compiled before.

    Args:
        optimizer: a key of `OPTIMIZERS`.
        workload: what is computed.
        effort: how many rounds, and how long.
        device: where.
        names: keys of `STEPS`, `ORDINARY` among them.

    Returns:
        `failure`, a short phrase; or `parts`: by name, `seconds`, their `ratio` to the better of the ordinary steps,
        round by round, `peak_bytes`, `memory`, which is that to the lesser of theirs, and of what is compiled
        `compiled`: the seconds `spent`, the `backend`, and `pays_after` how many steps; and `warnings`.
    """
    where = {"limit": effort.limit + COMPILING * (PRIVATE_COMPILED in names), "device": device}
    with TemporaryDirectory() as cache:
        try:
            point = in_own_process(_times, names, optimizer, workload, effort, device, cache, **where)
        except FailedError as error:
            return {"failure": str(error)}
        for name, part in point["parts"].items():
            by = part.get("compiled", {}).get("backend")
            try:
                found = in_own_process(_peak, name, by, optimizer, workload, device, cache, **where)
                part["peak_bytes"] = found["bytes"]
            except FailedError as error:
                part["peak_bytes"], part["memory_failure"] = None, str(error)
    peaks = [point["parts"][name]["peak_bytes"] for name in (ORDINARY, ORDINARY_COMPILED) if name in point["parts"]]
    least = min((found for found in peaks if found), default=None)
    for part in point["parts"].values():
        part["memory"] = part["peak_bytes"] / least if part["peak_bytes"] and least else None
    return point


def table(title: str, point: Point) -> Table:
    """Show what `whole_step` returned."""
    compiled = any("compiled" in part for part in point.get("parts", {}).values())
    more = ["compiled in, s", "pays after", "by"] if compiled else []
    made = report.table(title, "part", "seconds", "× non-private step", "peak MB", *more)
    if "failure" in point:
        made.add_row("(all)", point["failure"])
    for name, part in point.get("parts", {}).items():
        if "failure" in part:
            made.add_row(name, "", part["failure"], style="dim")
            continue
        how = part.get("compiled", {})
        made.add_row(
            name,
            f"{part['seconds']:.4f}",
            report.with_quartiles(part["ratio"]),
            report.megabytes(part["peak_bytes"]) + (f" (× {part['memory']:.2f})" if part.get("memory") else ""),
            *([f"{how['spent']:.0f}", f"{how['pays_after']:.0f}" if how.get("pays_after") else "", how["backend"]]
              if how else [""] * len(more)),
        )  # fmt: skip
    return made


def adaptive_step(name: str, workload: Workload, effort: Effort, device: str) -> Point:
    """Time a whole step with adaptive clipping against one of ours with a fixed clip norm, in turns, in an own process.

    Args:
        name: a key of `ADAPTIVE`.
        workload: what is computed.
        effort: how many rounds, and how long.
        device: where.

    Returns:
        `failure`, a short phrase; or `seconds`, of both steps, `ratio`, the spread of their quotients, and `warnings`.
    """
    try:
        return in_own_process(_adaptive_times, name, workload, effort, device, limit=effort.limit, device=device)
    except FailedError as error:
        return {"failure": str(error)}


def _adaptive_times(name: str, workload: Workload, effort: Effort, device: str) -> Point:
    task = workload.task(device)
    times = interleaved({FLAT: _our_step(task, CLIP_NORM), name: ADAPTIVE[name](task)}, effort.rounds, device)
    ratio = spread(own / base for own, base in zip(times[name], times[FLAT], strict=True))
    return {"seconds": {step: median(own) for step, own in times.items()}, "ratio": ratio}


def _our_step(task: Task, clip_norm: float | pegrad.Adaptive) -> Callable[[], Any]:
    step = _step(task, pegrad.optim.sgd(LEARNING_RATE), clip_norm)
    return partial(step, task.params, step.init(task.params, pegrad.random.key(0)), task.batch)


def _our_adaptive_step(task: Task) -> Callable[[], Any]:
    return _our_step(task, pegrad.Adaptive(CLIP_NORM, count_noise_multiplier=COUNT_NOISE_MULTIPLIER))


FLAT = "flat"
ADAPTIVE: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "adaptive": _our_adaptive_step,
    "Opacus adaptive": partial(peers.opacus_adaptive_step, clip_norm=CLIP_NORM, noise_multiplier=NOISE_MULTIPLIER),
}
"""By name, from a task to a whole step."""


def _times(names: Sequence[str], optimizer: str, workload: Workload, effort: Effort, device: str, cache: str) -> Point:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that compiling takes as long as the first time
    task = workload.task(device)
    steps: dict[str, Callable[[], Any]] = {}
    parts: dict[str, Point] = {}
    for name in names:
        try:
            step, made = STEPS[name](task, optimizer)
            step()
            steps[name], parts[name] = step, {"compiled": made} if made else {}
        except Exception as error:
            parts[name] = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    times = interleaved(steps, effort.step_rounds, device)
    better = [min(pair) for pair in zip(*(times[n] for n in (ORDINARY, ORDINARY_COMPILED) if n in times), strict=True)]
    for name, own in times.items():
        parts[name]["seconds"] = median(own)
        parts[name]["ratio"] = spread(o / b for o, b in zip(own, better, strict=True))
    for compiled, eager in (ORDINARY_COMPILED, ORDINARY), (PRIVATE_COMPILED, PRIVATE):
        if compiled in times and parts[compiled]["compiled"]["backend"] != "eagerly":
            won = parts[eager]["seconds"] - parts[compiled]["seconds"]
            parts[compiled]["compiled"]["pays_after"] = parts[compiled]["compiled"]["spent"] / won if won > 0 else None
    return {"parts": parts}


def _peak(name: str, by: str | None, optimizer: str, workload: Workload, device: str, cache: str) -> Point:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # that of the steps' times
    large_blocks_apart()  # before anything is compiled, which computes as well
    task = workload.task(device)
    if by == "eagerly":
        name, by = PRIVATE, None
    compiled = name == PRIVATE_COMPILED and by
    make = partial(_private, compiles=True, backend=by) if compiled else STEPS[name]
    run, _ = make(task, optimizer)
    run()  # an optimizer makes its state in its first step
    return {"bytes": peak(run, device)[1]}


def _ordinary(task: Task, optimizer: str, *, compiles: bool = False) -> tuple[Callable[[], Any], Point]:
    """The mean loss's gradient and torch's own optimizer, in place, on a copy of the parameters."""
    module = task.module()
    images, labels = task.batch
    inner = OPTIMIZERS[optimizer][0](native.trained(module), lr=LEARNING_RATE)
    network, update = (torch.compile(module), torch.compile(inner.step)) if compiles else (module, inner.step)

    def step() -> None:
        cross_entropies(network(images), labels).mean().backward()
        update()
        inner.zero_grad(set_to_none=True)

    if not compiles:
        return step, {}
    begun = time.perf_counter()
    step()
    step()
    return step, {"spent": time.perf_counter() - begun, "backend": "torch.compile"}


def _ordinary_update(task: Task, optimizer: str) -> tuple[Callable[[], Any], Point]:
    """What the update takes of an ordinary step."""
    module = task.module()
    images, labels = task.batch
    parameters = list(native.trained(module))
    inner = OPTIMIZERS[optimizer][0](parameters, lr=LEARNING_RATE)
    grads = torch.autograd.grad(cross_entropies(module(images), labels).mean(), parameters)

    def update() -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        inner.step()
        inner.zero_grad(set_to_none=True)

    return update, {}


def _private(
    task: Task, optimizer: str, *, compiles: bool = False, backend: str | None = None
) -> tuple[Callable[[], Any], Point]:
    """The step of `pegrad.dp_sgd`, on from where the one before it got to; compiled, in place like the ordinary one."""
    step: Any = _step(task, OPTIMIZERS[optimizer][1](LEARNING_RATE), CLIP_NORM)
    params = trees.map(torch.clone, task.params)
    at = [params, step.init(params, pegrad.random.key(0))]
    made: Point = {}
    if compiles:
        step = pegrad.compile(step, *at, task.batch, backend=backend, donate=True)
        (how,) = step.reports
        made = {
            "spent": how.spent,
            "backend": how.backend,
            "operations": how.operations,
            "seconds": dict(how.seconds),
            "parts": [dict(part) for part in how.parts],
            "rejected": list(how.rejected),
        }

    def run() -> None:
        at[:] = step(*at, task.batch)[:2]

    return run, made


def _noise(task: Task, optimizer: str) -> tuple[Callable[[], Any], Point]:
    """What noise takes of a private step."""
    step = _step(task, OPTIMIZERS[optimizer][1](LEARNING_RATE), CLIP_NORM)
    grads = step.clipped_grad(task.params, task.batch).grads
    std = NOISE_MULTIPLIER * step.clipped_grad.sensitivity
    return partial(pegrad.add_noise, pegrad.random.key(0), grads, std, step=0), {}


def _private_update(task: Task, optimizer: str) -> tuple[Callable[[], Any], Point]:
    """What the update takes of a private step."""
    step = _step(task, OPTIMIZERS[optimizer][1](LEARNING_RATE), CLIP_NORM)
    state = step.init(task.params, pegrad.random.key(0))
    grads = step.clipped_grad(task.params, task.batch).grads

    def update() -> Any:
        updates, _ = step.update(grads, state.optimizer, task.params)
        return pegrad.optim.apply_updates(task.params, updates)

    return update, {}


def _opacus(task: Task, optimizer: str) -> tuple[Callable[[], Any], Point]:
    return peers.opacus_step(task, OPTIMIZERS[optimizer][0], CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE), {}


STEPS: dict[str, Callable[[Task, str], tuple[Callable[[], Any], Point]]] = {
    ORDINARY: _ordinary,
    ORDINARY_COMPILED: partial(_ordinary, compiles=True),
    PRIVATE: _private,
    PRIVATE_COMPILED: partial(_private, compiles=True),
    OPACUS: _opacus,
    "noise": _noise,
    "private update": _private_update,
    "non-private update": _ordinary_update,
}
"""By name, from a task and the name of an optimizer to a step or a part of one, and how it was compiled."""


def _step(task: Task, optimizer: Any, clip_norm: float | pegrad.Adaptive) -> pegrad.DPSGD:
    return pegrad.dp_sgd(
        task.loss,
        optimizer,
        clip_norm=clip_norm,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=len(task.batch[0]),
    )
