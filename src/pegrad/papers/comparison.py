"""Strategies side by side: how long each takes for one loss, and how far its answer is from that of `vmap`.

Times on a shared machine drift. So the contestants take turns, round after round, and what is compared is the
ratio of two times of one round, of which the median over the rounds is taken.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import per_example, trees
from pegrad.errors import ArgumentError
from pegrad.papers.training import mean_grad
from pegrad.per_example import Loss
from pegrad.strategies import STRATEGIES, Strategy
from pegrad.trees import PyTree

BASELINE = "non-private gradient"

# What to do with the per-example gradients; each turns a loss and a strategy into a function of params and batch.
QUESTIONS: dict[str, Callable[[Loss, Strategy], Callable[[PyTree, PyTree], PyTree]]] = {
    "stacked": lambda loss, strategy: per_example.per_example_grad(loss, strategy=strategy),
    "norms": lambda loss, strategy: per_example.per_example_norm(loss, strategy=strategy),
    "clipped": lambda loss, strategy: _clipped_sum(loss, strategy),
}


class Row(NamedTuple):
    """One line of a comparison."""

    name: str
    seconds: float
    """Median time of one call."""
    ratio: float
    """Median, over the rounds, of its time over the non-private gradient's."""
    difference: float | None
    """`relative_difference` to the answer of `vmap`; None for the non-private gradient, which answers another
    question."""


def compare(
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    *,
    question: str = "clipped",
    repeats: int = 5,
) -> list[Row]:
    """Time strategies next to the gradient of the mean loss, in turns.

    Args:
        loss: `loss(params, example) -> scalar`, a pure function of one example.
        params: pytree of floating-point tensors, in the nodes that torch's own pytrees have: tuple, list, dict.
        batch: pytree of tensors with one leading axis `B`, in the same nodes.
        strategies: what to compare, by name.
        question: what they are asked for, a key of `QUESTIONS`: "stacked", every example's gradient; "norms",
            their norms; "clipped", the sum of the gradients clipped to norm 1.
        repeats: how many rounds are timed, at least 1.

    Returns:
        The non-private gradient's row, then one for each strategy.

    Raises:
        ArgumentError: an unknown question, or `repeats` below 1.
        LeafError, LossError: as `pegrad.per_example_grad`.
    """
    if question not in QUESTIONS:
        raise ArgumentError(f"Expected question to be one of {[*QUESTIONS]}, got {question!r}")
    asked = {name: QUESTIONS[question](loss, strategy) for name, strategy in strategies.items()}
    functions = {BASELINE: mean_grad(loss), **asked}
    device = trees.leaves(params)[0].device
    times = interleaved({name: _call(f, params, batch) for name, f in functions.items()}, repeats, device)
    slower = ratios(times, BASELINE)
    reference = QUESTIONS[question](loss, STRATEGIES["vmap"])(params, batch)
    differences = {name: relative_difference(f(params, batch), reference) for name, f in asked.items()}
    return [Row(name, median(times[name]), slower[name], differences.get(name)) for name in functions]


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Time functions in turns, having called each once before: one call of each is a round.

    Args:
        functions: what to time, by name.
        repeats: how many rounds are timed, at least 1.
        device: where they compute; a CUDA device is waited for before every look at the clock.

    Returns:
        By name, the seconds that each call took: entry i of every list belongs to round i.

    Raises:
        ArgumentError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ArgumentError(f"Expected repeats >= 1, got repeats={repeats}")
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function, device)[1])
    return times


def timed(function: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[Any, float]:
    """Call a function, and return its value and the seconds that it took.

    Args:
        function: what to call.
        device: where it computes; a CUDA device is waited for before both looks at the clock.
    """
    _wait_for(device)
    start = time.perf_counter()
    value = function()
    _wait_for(device)
    return value, time.perf_counter() - start


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Compare times round by round.

    Args:
        times: what `interleaved` returned.
        baseline: the name of the function that the others are compared with.

    Returns:
        By name, the median over the rounds of its time over the baseline's.

    >>> ratios({"one": [1.0, 9.0, 2.0], "two": [2.0, 9.0, 5.0]}, "one")
    {'one': 1.0, 'two': 2.0}
    """
    return {
        name: median(own / base for own, base in zip(taken, times[baseline], strict=True))
        for name, taken in times.items()
    }


def relative_difference(tree: PyTree, reference: PyTree) -> float:
    """How far a pytree of tensors is from another, leaf by leaf.

    Returns:
        The largest, over the leaves, of the largest absolute difference over the reference's largest absolute value.

    >>> relative_difference([torch.ones(2), torch.tensor([4.0, 3.0])], [torch.ones(2), torch.tensor([4.0, 2.0])])
    0.25
    """
    pairs = zip(trees.leaves(tree), trees.leaves(reference), strict=True)
    return max(_leaf_difference(ours, theirs) for ours, theirs in pairs)


def machine() -> dict[str, str | int | None]:
    """Describe what the times were taken on: a time means little without it."""
    return {
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _clipped_sum(loss: Loss, strategy: Strategy) -> Callable[[PyTree, PyTree], PyTree]:
    clipped = per_example.clipped_grad(loss, clip_norm=1.0, strategy=strategy)
    return lambda params, batch: clipped(params, batch).grads


def _call(function: Callable[[PyTree, PyTree], Any], params: PyTree, batch: PyTree) -> Callable[[], Any]:
    return lambda: function(params, batch)


def _wait_for(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _leaf_difference(ours: Tensor, theirs: Tensor) -> float:
    largest = theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
    return ((ours - theirs).abs().max() / largest).item()


def _processor() -> str:
    """Name the processor; only Linux's own file tells its model there."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
