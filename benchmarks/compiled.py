"""What compiling makes of the whole private step: time, peak memory, and after how many steps it has paid.

    python benchmarks/compiled.py [--scale smoke|cpu|full] [--only WORKLOAD ...] [--optimizers sgd adam]

An ordinary step, eager and with its forward and backward pass and its update compiled by `torch.compile`; our private
step, eager and by `pegrad.compile`, which takes the fastest of a graph run operation by operation, one compiled by
Inductor, and no graph; and Opacus's private step by hooks. Noise is a part of every private step, the update of all.
Steps take turns in one process, where compilers find nothing that was compiled before; a process of its own for each
says what it needs at its peak. The ratio is to the better of the ordinary steps.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import native
import peers
import pegrad
import report
import runner
from contest import CLIP_NORM, FEW
from isolation import FailedError, in_own_process, peak
from pegrad import trees
from pegrad.papers.comparison import interleaved
from runner import Effort, Point, Results, spread
from whole_step import LEARNING_RATE, NOISE_MULTIPLIER, OPTIMIZERS
from workloads import SCALES, Task, Workload, cross_entropies

EFFORTS = {
    "smoke": Effort(rounds=2, limit=300),
    "cpu": Effort(rounds=7, limit=900),
    "full": Effort(rounds=25, limit=1800),
}
_NETWORKS = ["vgg11", "vgg19", "resnet18", "vit", "bert", "gpt2", "llama", "lstm"]
ROWS = {"smoke": ["tiny"], "cpu": _NETWORKS, "full": _NETWORKS}
NATIVE, NATIVE_COMPILED = "native", "native compiled"
OURS, OURS_COMPILED = "ours", "ours compiled"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("What compiling makes of the whole private step.", EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="these workloads; all of the scale's")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], help="these; all")
    options = runner.parse(parser, argv)
    workloads = {row: SCALES[options.scale][row] for row in options.only or ROWS[options.scale]}
    path = options.out / f"compiled_{options.scale}_{options.device}.json"
    settings = {"clip_norm": CLIP_NORM, "allocator": options.allocator, **options.effort._asdict()}
    results = Results(path, settings, options.device, fresh=options.fresh)
    how = {"effort": options.effort, "device": options.device}
    lines = [(row, optimizer) for row in workloads for optimizer in options.optimizers]
    points = {f"{row}/{optimizer}": partial(_measure, optimizer, workloads[row], **how) for row, optimizer in lines}
    runner.run(points, results)
    console = Console(width=120)
    for row, optimizer in lines:
        console.print(_table(f"{row}, {optimizer}", results[f"{row}/{optimizer}"]))
    console.print(str(path), soft_wrap=True)


def _table(title: str, point: Point) -> Table:
    table = Table(
        "whole step", "seconds", "× better native", "peak MB", "× memory", "compiled in, s", "pays after", "by"
    )
    table.title = title
    if "failure" in point:
        table.add_row(point["failure"])
        return table
    for name, part in point["parts"].items():
        if "failure" in part:
            table.add_row(name, part["failure"])
            continue
        made = part.get("compiled", {})
        table.add_row(
            name,
            f"{part['seconds']:.3f}",
            report.with_quartiles(part["ratio"]),
            report.megabytes(part["peak_bytes"]),
            f"{part['memory']:.2f}" if part["memory"] else "",
            f"{made['spent']:.0f}" if made else "",
            f"{made['pays_after']:.0f}" if made.get("pays_after") else "",
            made.get("backend", ""),
        )
    return table


def _measure(optimizer: str, workload: Workload, effort: Effort, device: str) -> Point:
    where = {"limit": effort.limit, "device": device}
    with TemporaryDirectory() as cache:
        try:
            point = in_own_process(_times, optimizer, workload, effort, device, cache, **where)
        except FailedError as error:
            return {"failure": str(error)}
        for name, part in point["parts"].items():
            by = part.get("compiled", {}).get("backend")
            try:
                part["peak_bytes"] = in_own_process(_peak, name, by, optimizer, workload, device, cache, **where)[
                    "bytes"
                ]
            except FailedError as error:
                part["peak_bytes"], part["memory_failure"] = None, str(error)
    native_peaks = [point["parts"][name]["peak_bytes"] for name in (NATIVE, NATIVE_COMPILED) if name in point["parts"]]
    least = min((found for found in native_peaks if found), default=None)
    for part in point["parts"].values():
        part["memory"] = part["peak_bytes"] / least if part["peak_bytes"] and least else None
    return point


def _times(optimizer: str, workload: Workload, effort: Effort, device: str, cache: str) -> Point:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that compiling takes as long as the first time
    task = workload.task(device)
    steps: dict[str, Callable[[], Any]] = {}
    parts: dict[str, Point] = {}
    for name, make in STEPS.items():
        try:
            step, made = make(task, optimizer)
            step()
            steps[name], parts[name] = step, {"compiled": made} if made else {}
        except Exception as error:
            parts[name] = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    times = interleaved(steps, effort.rounds, device)
    better = [min(pair) for pair in zip(*(times[n] for n in (NATIVE, NATIVE_COMPILED) if n in times), strict=True)]
    for name, own in times.items():
        parts[name]["seconds"] = median(own)
        parts[name]["ratio"] = spread(o / b for o, b in zip(own, better, strict=True))
    _pays(parts.get(NATIVE_COMPILED, {}), parts[NATIVE])
    _pays(parts.get(OURS_COMPILED, {}), parts[OURS])
    return {"parts": parts}


def _pays(compiled: Point, eager: Point) -> None:
    """Note after how many steps the time spent on compiling is won back, if ever."""
    if "seconds" in compiled and compiled["compiled"]["backend"] != "eagerly":
        won = eager["seconds"] - compiled["seconds"]
        compiled["compiled"]["pays_after"] = compiled["compiled"]["spent"] / won if won > 0 else None


def _peak(name: str, by: str | None, optimizer: str, workload: Workload, device: str, cache: str) -> Point:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # that of the steps' times
    task = workload.task(device)
    if by == "eagerly":
        name, by = OURS, None
    if by:
        make = partial(_ours, compiles=True, backend=by) if name == OURS_COMPILED else STEPS[name]
        run, _ = make(task, optimizer)
        run()
    else:
        STEPS[name](task.first(FEW), optimizer)[0]()
        run, _ = STEPS[name](task, optimizer)
    return {"bytes": peak(run, device)[1]}


def _native(task: Task, optimizer: str, *, compiles: bool = False) -> tuple[Callable[[], Any], Point]:
    """The mean loss's gradient and torch's own optimizer, in place."""
    module = task.module()
    images, labels = task.batch
    parameters = list(native.trained(module))
    inner = OPTIMIZERS[optimizer][0](parameters, lr=LEARNING_RATE)
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


def _ours(
    task: Task, optimizer: str, *, compiles: bool = False, backend: str | None = None
) -> tuple[Callable[[], Any], Point]:
    """The step of `pegrad.dp_sgd`, on from where the one before it got to."""
    step: Any = pegrad.dp_sgd(
        task.loss,
        OPTIMIZERS[optimizer][1](LEARNING_RATE),
        clip_norm=CLIP_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=len(task.batch[0]),
    )
    params = trees.map(torch.clone, task.params)
    at = [params, step.init(params, pegrad.random.key(0))]
    made: Point = {}
    if compiles:
        step = pegrad.compile(step, *at, task.batch, backend=backend)
        (how,) = step.reports
        made = {
            "spent": how.spent,
            "backend": how.backend,
            "operations": how.operations,
            "seconds": dict(how.seconds),
            "rejected": list(how.rejected),
        }

    def run() -> None:
        at[:] = step(*at, task.batch)[:2]

    return run, made


STEPS: dict[str, Callable[[Task, str], tuple[Callable[[], Any], Point]]] = {
    NATIVE: _native,
    NATIVE_COMPILED: partial(_native, compiles=True),
    OURS: _ours,
    OURS_COMPILED: partial(_ours, compiles=True),
    "Opacus": lambda task, optimizer: (
        peers.opacus_step(task, OPTIMIZERS[optimizer][0], CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE),
        {},
    ),
}
"""By name, from a task and the name of an optimizer to a step, and how it was compiled."""


if __name__ == "__main__":
    main()
