"""The whole step, with noise and update, against an ordinary one; and what noise and update take of it."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import native
import peers
import pegrad
from contest import CLIP_NORM, FEW
from isolation import FailedError, in_own_process, peak
from pegrad.papers.comparison import interleaved
from pegrad.trees import PyTree
from runner import Effort, Point, spread
from workloads import Task, Workload, cross_entropies

NOISE_MULTIPLIER = 1.1
COUNT_NOISE_MULTIPLIER = 10.0  # of adaptive clipping
LEARNING_RATE = 1e-3
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (torch.optim.SGD, pegrad.optim.sgd),
    "adam": (torch.optim.Adam, pegrad.optim.adam),
}
BASELINE = "non-private step"


def whole_step(optimizer: str, workload: Workload, effort: Effort, device: str) -> Point:
    """Time a step and its parts, all in turns, in a process of its own, and measure their memory in another.

    Args:
        optimizer: a key of `OPTIMIZERS`.
        workload: what is computed.
        effort: how many rounds, and how long.
        device: where.

    Returns:
        `failure`, a short phrase; or `parts`: by name, `seconds`, their `ratio` to the non-private step's, round by
        round, and `peak_bytes`; and `warnings`.
    """
    where = {"limit": effort.limit, "device": device}
    try:
        times = in_own_process(_times, optimizer, workload, effort, device, **where)
        peaks = in_own_process(_peaks, optimizer, workload, device, **where)
    except FailedError as error:
        return {"failure": str(error)}
    for name, part in times["parts"].items():
        part["peak_bytes"] = peaks["peak_bytes"][name]
    return times


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


def _times(optimizer: str, workload: Workload, effort: Effort, device: str) -> Point:
    times = interleaved(_functions(optimizer, workload.task(device)), effort.step_rounds, device)
    base = times[BASELINE]
    parts = {
        name: {"seconds": median(own), "ratio": spread(o / b for o, b in zip(own, base, strict=True))}
        for name, own in times.items()
    }
    return {"parts": parts}


def _peaks(optimizer: str, workload: Workload, device: str) -> Point:
    task = workload.task(device)
    warm_up, _ = peak(partial(_functions, optimizer, task.first(FEW)), device)
    for run in warm_up.values():
        peak(run, device)
    functions, _ = peak(partial(_functions, optimizer, task), device)  # gradients are computed for it
    return {"peak_bytes": {name: peak(run, device)[1] for name, run in functions.items()}}


def _functions(optimizer: str, task: Task) -> dict[str, Callable[[], Any]]:
    ordinary, ours = OPTIMIZERS[optimizer]
    return _ordinary_step(task, ordinary) | _private_step(task, ours(LEARNING_RATE))


def _ordinary_step(task: Task, make: Callable[..., torch.optim.Optimizer]) -> dict[str, Callable[[], Any]]:
    """Gradient of the mean loss and torch's own optimizer, in place, on a copy of the parameters."""
    module = deepcopy(task.module())
    images, labels = task.batch
    parameters = list(native.trained(module))
    optimizer = make(parameters, lr=LEARNING_RATE)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropies(module(images), labels).mean(), parameters)

    def update(grads: tuple[Tensor, ...]) -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    return {BASELINE: lambda: update(gradient()), "non-private update": partial(update, gradient())}


def _private_step(task: Task, optimizer: Any) -> dict[str, Callable[[], Any]]:
    """The step of `pegrad.dp_sgd`, and the two parts of it that come after the clipped gradient."""
    step = _step(task, optimizer, CLIP_NORM)
    key = pegrad.random.key(0)
    state = step.init(task.params, key)
    grads = step.clipped_grad(task.params, task.batch).grads

    def update() -> PyTree:
        updates, _ = step.update(grads, state.optimizer, task.params)
        return pegrad.optim.apply_updates(task.params, updates)

    return {
        "private step": partial(step, task.params, state, task.batch),
        "noise": partial(pegrad.add_noise, key, grads, NOISE_MULTIPLIER * step.clipped_grad.sensitivity, step=0),
        "private update": update,
    }


def _step(task: Task, optimizer: Any, clip_norm: float | pegrad.Adaptive) -> pegrad.DPSGD:
    return pegrad.dp_sgd(
        task.loss,
        optimizer,
        clip_norm=clip_norm,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=len(task.batch[0]),
    )
