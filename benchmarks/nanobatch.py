"""Micro-batches (Lee et al. 2021): throughput and peak memory of a fixed logical batch, cut into 1, 2, 4, ... B.

    python benchmarks/nanobatch.py [--scale smoke|cpu|full]

A clipped sum is a sum over examples, so a batch of any size fits into the memory of one example, at a price.
"""

from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

import runner
from contest import CLIP_NORM
from contestants import by_strategy
from isolation import in_own_process, peak
from pegrad.papers.comparison import timed
from runner import Effort, Point, Results, spread
from workloads import SCALES, TABLE, Workload

EFFORTS = {
    "smoke": Effort(rounds=1, limit=60),
    "cpu": Effort(rounds=3),
    "full": Effort(rounds=15),
}
WORKLOADS = {"smoke": SCALES["smoke"]["tiny"], "cpu": TABLE["wrn16_4"], "full": TABLE["wrn16_4"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    options = runner.parse(runner.parser("Throughput and memory against the micro-batch's size.", EFFORTS), argv)
    workload = WORKLOADS[options.scale]
    path = options.out / f"nanobatch_{options.scale}_{options.device}.json"
    settings = {"batch_size": workload.batch_size, "allocator": options.allocator, "rounds": options.effort.rounds}
    results = Results(path, settings, options.device, fresh=options.fresh)
    sizes = [1 << i for i in range(workload.batch_size.bit_length())]
    runner.run(
        {f"{size}": partial(measure, workload, size, options.effort, options.device) for size in sizes},
        results,
    )
    table = Table("micro-batch", "examples / s", "peak MB", title=f"A logical batch of {workload.batch_size}")
    for size in sizes:
        point = results[f"{size}"]
        memory = point["peak_bytes"]
        table.add_row(str(size), f"{point['throughput']:.1f}", "" if memory is None else f"{memory / 1e6:.0f}")
    Console(width=100).print(table)
    print(path)


def measure(workload: Workload, size: int, effort: Effort, device: str) -> Point:
    """Measure one size of micro-batch: `throughput` in examples a second, `seconds`, and `peak_bytes`."""
    where = {"limit": effort.limit, "device": device}
    seconds = in_own_process(_time, workload, size, effort.rounds, device, **where)["seconds"]
    memory = in_own_process(_memory, workload, size, device, **where)["peak_bytes"]
    return {"throughput": workload.batch_size / seconds, "seconds": seconds, "peak_bytes": memory}


def _time(workload: Workload, size: int, rounds: int, device: str) -> Point:
    run = by_strategy(workload.task(device), CLIP_NORM, "auto", size)
    run()
    return {"seconds": spread(timed(run, device)[1] for _ in range(rounds))["median"]}


def _memory(workload: Workload, size: int, device: str) -> Point:
    task = workload.task(device)
    peak(by_strategy(task.first(1), CLIP_NORM, "auto"), device)
    return {"peak_bytes": peak(by_strategy(task, CLIP_NORM, "auto", size), device)[1]}


if __name__ == "__main__":
    main()
