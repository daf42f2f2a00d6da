"""Where the time goes: the operations of a clipped gradient beside those of the non-private gradient.

    python benchmarks/operations.py [--scale smoke|cpu|full] [--only WORKLOAD ...] [--strategy auto]

prints, for each workload, the operations whose times differ most, and what no operation accounts for: Python.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import report
import runner
from contest import CLIP_NORM
from contestants import BASELINE, CONTESTANTS
from isolation import in_own_process
from pegrad.papers.comparison import timed
from runner import Effort, Point, Results
from workloads import SCALES, Workload

EFFORTS = {"smoke": Effort(rounds=1), "cpu": Effort(rounds=5), "full": Effort(rounds=15)}
REST = "(none: Python, and what waits)"
SHOWN = 16
WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Profile what is missing, and print the tables."""
    parser = runner.parser("The operations of a clipped gradient.", EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="these workloads; all of the scale's")
    parser.add_argument("--strategy", choices=CONTESTANTS, default="auto", help="whose gradient (%(default)s)")
    options = runner.parse(parser, argv)
    workloads = {name: SCALES[options.scale][name] for name in options.only or SCALES[options.scale]}
    path = options.out / f"operations_{options.scale}_{options.device}.json"
    settings = {"allocator": options.allocator, "rounds": options.effort.rounds, "strategy": options.strategy}
    results = Results(path, settings, options.device, fresh=options.fresh)
    arguments = options.strategy, options.effort.rounds, options.device
    measure = partial(in_own_process, _measure, limit=options.effort.limit)
    runner.run({row: partial(measure, workload, *arguments) for row, workload in workloads.items()}, results)
    for row, workload in workloads.items():
        found = results[row]["milliseconds"]
        ours, base = found[options.strategy], found[BASELINE]
        most = sorted({*ours, *base}, key=lambda name: -abs(ours.get(name, 0) - base.get(name, 0)))[:SHOWN]
        table = Table("operation, ms", BASELINE, options.strategy, "more", title=report.caption(row, workload))
        for name in most:
            own, other = ours.get(name, 0), base.get(name, 0)
            table.add_row(name, f"{other:.1f}", f"{own:.1f}", f"{own - other:+.1f}")
        table.add_row("all", f"{sum(base.values()):.1f}", f"{sum(ours.values()):.1f}", "", style="bold")
        Console(width=100).print(table)
    print(path)


def _measure(workload: Workload, strategy: str, rounds: int, device: str) -> Point:
    task = workload.task(device)
    functions = {name: CONTESTANTS[name].make(task, CLIP_NORM) for name in (BASELINE, strategy)}
    found: dict[str, list[Counter[str]]] = {name: [] for name in functions}
    for _ in range(WARM_UP + rounds):  # in turns: memory that one has left over, the other has to make do with
        for name, function in functions.items():
            found[name].append(_by_operation(function, device))
    return {"milliseconds": {name: _medians(runs[WARM_UP:]) for name, runs in found.items()}}


def _by_operation(function: Callable[[], Any], device: str) -> Counter[str]:
    """Milliseconds of one call that each operation takes by itself, and `REST`."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        _, seconds = timed(function, device)
    taken: Counter[str] = Counter()
    for event in found.key_averages():
        if on_gpu or event.key.startswith("aten::"):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            taken[event.key.removeprefix("aten::")] += own / 1e3
    taken[REST] = 1e3 * seconds - sum(taken.values())
    return taken


def _medians(runs: list[Counter[str]]) -> dict[str, float]:
    names = set().union(*runs)
    return {name: round(median(run[name] for run in runs), 3) for name in sorted(names)}


if __name__ == "__main__":
    main()
