"""Where the time goes: the operations of a clipped gradient beside those of the non-private gradient.

    python benchmarks/operations.py [--scale smoke|cpu|full] [--only WORKLOAD ...] [--strategy auto]

prints, for each workload, the operations whose times differ most, and what no operation accounts for: Python.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
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
from pegrad.comparison import timed
from runner import Effort, Point, Results
from workloads import SCALES, Workload

EFFORTS = {"smoke": Effort(rounds=1), "cpu": Effort(rounds=5), "full": Effort(rounds=15)}
REST = "(none: Python, and what waits)"
SHOWN = 16


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
    for function in functions.values():
        function()
    return {"milliseconds": {name: _by_operation(run, rounds, device) for name, run in functions.items()}}


def _by_operation(function: Callable[[], Any], rounds: int, device: str) -> dict[str, float]:
    """Milliseconds of one call that each operation takes by itself, and `REST`."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        seconds = sum(timed(function, device)[1] for _ in range(rounds))
    taken: Counter[str] = Counter()
    for event in found.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.key.startswith("aten::") or on_gpu:
            taken[event.key.removeprefix("aten::")] += own / 1e3 / rounds
    taken[REST] = 1e3 * seconds / rounds - sum(taken.values())
    return {name: round(time, 3) for name, time in taken.most_common() if time > 0.001}


if __name__ == "__main__":
    main()
