"""One contestant against the non-private gradient, in turns: is it right, how long does it take; and what memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contestants import BASELINE, EVERYONE
from isolation import FailedError, in_own_process, peak
from pegrad import trees
from pegrad.papers.comparison import relative_difference, timed
from pegrad.trees import PyTree
from runner import Effort, Point, spread
from workloads import Task, Workload

CLIP_NORM = 1.0
FEW = 2  # examples of the check in float64, and of the first call, which loads and compiles what is needed


def contest(name: str, row: str, workload: Workload, effort: Effort, device: str, references: Path) -> Point:
    """Time a contestant, and check its answer, in a process of its own.

    Args:
        name: a key of `EVERYONE`.
        row: the workload's name.
        workload: what is computed.
        effort: how many rounds, and how long.
        device: where.
        references: a folder for this workload alone, where our answers to it are kept.

    Returns:
        `failure`, a short phrase; or

        - `difference`: how far its clipped sum is from ours for a few examples in float64, and `difference_as_timed`,
          for the whole batch in float32; None for what does not clip;
        - `seconds` and `baseline_seconds`, round by round, and `ratio`, the spread of their quotients;
        - `warnings`.
    """
    return _apart(name, row, effort, device, _contest, name, workload, effort, device, references)


def memory(name: str, row: str, workload: Workload, effort: Effort, device: str) -> Point:
    """Measure the peak memory of a contestant in a process of its own; arguments as for `contest`.

    Returns:
        `failure`; or `peak_bytes`, None where the system cannot tell, and `warnings`.
    """
    return _apart(name, row, effort, device, _memory, name, workload, device)


def _apart(name: str, row: str, effort: Effort, device: str, function: Callable[..., Point], *arguments: Any) -> Point:
    cpu_rows = EVERYONE[name].cpu_rows
    if device == "cpu" and cpu_rows is not None and row not in cpu_rows:
        return {"failure": f"takes minutes on a CPU; run on {', '.join(cpu_rows)}"}
    try:
        return in_own_process(function, *arguments, limit=effort.limit, device=device)
    except FailedError as error:
        return {"failure": str(error)}


def _memory(name: str, workload: Workload, device: str) -> Point:
    if device != "cpu" and not EVERYONE[name].torch_memory:
        return {"peak_bytes": None}
    task, make = workload.task(device), EVERYONE[name].make
    peak(make(task.first(FEW), CLIP_NORM), device)  # what is loaded and compiled once is not counted
    return {"peak_bytes": peak(make(task, CLIP_NORM), device)[1]}


def _contest(name: str, workload: Workload, effort: Effort, device: str, references: Path) -> Point:
    task = workload.task(device)
    make, family = EVERYONE[name].make, EVERYONE[name].family
    clips = family != "floor"
    difference = _difference_in_float64(name, task, references) if clips else None

    baseline = EVERYONE[BASELINE].make
    for first in (baseline, make):
        first(task.first(FEW), CLIP_NORM)()
    theirs, ours = baseline(task, CLIP_NORM), make(task, CLIP_NORM)
    (_, base), (answer, own) = timed(theirs, device), timed(ours, device)
    first_round = base, own  # each had to fetch its memory: it counts for want of another only
    rounds: list[tuple[float, float]] = []
    as_timed = relative_difference(answer, _reference(name, task, references)) if clips else None
    del answer
    while len(rounds) < effort.rounds and (family == "ours" or _another_fits([first_round, *rounds], effort.budget)):
        rounds.append((timed(theirs, device)[1], timed(ours, device)[1]))
    rounds = rounds or [first_round]

    return {
        "difference": difference,
        "difference_as_timed": as_timed,
        "seconds": [own for _, own in rounds],
        "baseline_seconds": [base for base, _ in rounds],
        "ratio": spread(own / base for base, own in rounds),
    }


def _difference_in_float64(name: str, task: Task, references: Path) -> float:
    few = task.first(FEW).to(torch.float64)
    return relative_difference(EVERYONE[name].make(few, CLIP_NORM)(), _reference(name, few, references))


def _reference(name: str, task: Task, references: Path) -> PyTree:
    """Our own answer to what a contestant is asked: computed once, then read."""
    reference = EVERYONE[name].reference
    path = references / f"{reference}, {trees.leaves(task.params)[0].dtype}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save(EVERYONE[reference].make(task, CLIP_NORM)(), unfinished)
        unfinished.replace(path)
    return torch.load(path)


def _another_fits(rounds: list[tuple[float, float]], budget: float) -> bool:
    return sum(map(sum, rounds)) + sum(rounds[-1]) <= budget
