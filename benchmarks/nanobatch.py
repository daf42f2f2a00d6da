"""Micro-batches (Lee et al. 2021): throughput and peak memory of a fixed logical batch, cut into 1, 2, 4, ... B.

    python benchmarks/nanobatch.py [--scale smoke|cpu|full]

A clipped sum is a sum over examples, so a batch of any size fits into the memory of one example, at a price: by one
norm over all leaves, and layer by layer. Then the logical batch grows: at once; by `microbatch_size`, which has all
examples in memory; and streamed through `ClippedGrad.add`, each micro-batch made when it is asked for, as by a loader.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pegrad
import plotting
import report
import runner
from contest import CLIP_NORM
from contestants import by_strategy
from isolation import FailedError, in_own_process, peak
from pegrad.clipping import Clipping, Flat, PerLayer
from pegrad.papers.comparison import timed
from pegrad.trees import PyTree
from runner import Effort, Point, Results, spread
from workloads import SCALES, TABLE, Task, Workload

EFFORTS = {
    "smoke": Effort(rounds=1, limit=60),
    "cpu": Effort(rounds=3, limit=3600),
    "full": Effort(rounds=15, limit=3600),
}
WORKLOADS = {"smoke": SCALES["smoke"]["tiny"], "cpu": TABLE["wrn16_4"], "full": TABLE["wrn16_4"]}
CLIPPINGS: dict[str, Callable[[float], Clipping]] = {"flat": Flat, "per layer": PerLayer}
BATCHES = {"smoke": [4, 16], "cpu": [8, 64, 512, 2048, 10_000], "full": [8, 64, 512, 2048, 10_000]}
MICROBATCH = {"smoke": 4, "cpu": 8, "full": 8}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    options = runner.parse(runner.parser("Throughput and memory against the micro-batch's size.", EFFORTS), argv)
    workload = WORKLOADS[options.scale]
    path = options.out / f"nanobatch_{options.scale}_{options.device}.json"
    sizes = [1 << i for i in range(workload.batch_size.bit_length())] if options.scale != "smoke" else [2]
    batches, microbatch = BATCHES[options.scale], MICROBATCH[options.scale]
    settings = {
        "batch_size": workload.batch_size,
        "batches": batches,
        "microbatch": microbatch,
        "allocator": options.allocator,
        "rounds": options.effort.rounds,
    }
    results = Results(path, settings, options.device, fresh=options.fresh)
    where = options.effort, options.device
    points = {f"{name}/{size}": partial(measure, workload, name, size, *where) for name in CLIPPINGS for size in sizes}
    # At once, a large batch fits into no memory: what is measured ends where the first part's batch does.
    grown = [(way, size) for way in WAYS for size in batches if way != "at once" or size <= workload.batch_size]
    points |= {f"{way}/{size}": partial(memory, workload, way, size, microbatch, *where) for way, size in grown}
    runner.run(points, results)
    console = Console(width=100)
    console.print(_by_microbatch(workload.batch_size, sizes, results))
    found = {way: [(size, results[f"{way}/{size}"]) for own, size in grown if own == way] for way in WAYS}
    console.print(_by_batch(microbatch, batches, found))
    note = f"examples and sums included; micro-batches of {microbatch}; {results.where()}"
    lines = {
        way: [(size, point["peak_bytes"]) for size, point in own if point.get("peak_bytes")]
        for way, own in found.items()
    }
    plotting.memory_by_batch(lines, "Peak memory of the clipped gradient", note).savefig(path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}")


def measure(workload: Workload, clipping: str, size: int, effort: Effort, device: str) -> Point:
    """Measure one size of micro-batch: `throughput` in examples a second, `seconds`, and `peak_bytes`."""
    where = {"limit": effort.limit, "device": device}
    seconds = in_own_process(_time, workload, clipping, size, effort.rounds, device, **where)["seconds"]
    needed = in_own_process(_memory, workload, clipping, size, device, **where)["peak_bytes"]
    return {"throughput": workload.batch_size / seconds, "seconds": seconds, "peak_bytes": needed}


def _time(workload: Workload, clipping: str, size: int, rounds: int, device: str) -> Point:
    run = by_strategy(workload.task(device), CLIP_NORM, "auto", size, CLIPPINGS[clipping])
    run()
    return {"seconds": spread(timed(run, device)[1] for _ in range(rounds))["median"]}


def _memory(workload: Workload, clipping: str, size: int, device: str) -> Point:
    task, kind = workload.task(device), CLIPPINGS[clipping]
    peak(by_strategy(task.first(1), CLIP_NORM, "auto", clipping=kind), device)
    return {"peak_bytes": peak(by_strategy(task, CLIP_NORM, "auto", size, kind), device)[1]}


def memory(workload: Workload, way: str, size: int, microbatch: int, effort: Effort, device: str) -> Point:
    """Measure the peak memory of a logical batch's clipped gradient, its examples included, in a process of its own.

    Args:
        workload: what is computed; its own batch is not used.
        way: a key of `WAYS`.
        size: of the logical batch.
        microbatch: examples in a micro-batch.
        effort: how long it may take.
        device: where.

    Returns:
        `failure`, a short phrase; or `peak_bytes`, None where the system cannot tell, and `warnings`.
    """
    try:
        return in_own_process(_grown, workload, way, size, microbatch, device, limit=effort.limit, device=device)
    except FailedError as error:
        return {"failure": str(error)}


def _grown(workload: Workload, way: str, size: int, microbatch: int, device: str) -> Point:
    task = replace(workload, batch_size=microbatch).task(device)
    # What is loaded and compiled once is not counted.
    peak(partial(WAYS[way], task, microbatch, microbatch), device)
    return {"peak_bytes": peak(partial(WAYS[way], task, size, microbatch), device)[1]}


def at_once(task: Task, size: int, microbatch: int) -> PyTree:
    """The clipped gradient of a whole batch."""
    return by_strategy(_of_size(task, size), CLIP_NORM, "auto")()


def in_microbatches(task: Task, size: int, microbatch: int) -> PyTree:
    """The same by `microbatch_size`: the examples are in memory, all of them."""
    return by_strategy(_of_size(task, size), CLIP_NORM, "auto", microbatch)()


def streamed(task: Task, size: int, microbatch: int) -> PyTree:
    """The same from micro-batches that arrive one by one, and are let go."""
    clipped = pegrad.clipped_grad(task.loss, clip_norm=CLIP_NORM)
    sums = clipped.init(task.params)
    for batch in stream(task, size, microbatch):
        sums = clipped.add(sums, task.params, batch).sums
    return clipped.finish(sums)


WAYS: dict[str, Callable[[Task, int, int], PyTree]] = {
    "at once": at_once,
    "microbatch_size": in_microbatches,
    "streamed": streamed,
}
"""Ways to the clipped gradient of a large batch; the same examples for each."""


def stream(task: Task, size: int, microbatch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Make `size` examples like a task's in micro-batches, each when it is asked for; the same ones every time."""
    images, labels = task.batch
    generator = torch.Generator(images.device).manual_seed(0)
    for start in range(0, size, microbatch):
        count = min(microbatch, size - start)
        made = torch.randn(count, *images.shape[1:], generator=generator, device=images.device)
        yield made, labels[:count]


def _of_size(task: Task, size: int) -> Task:
    images, labels = task.batch
    whole = images.new_empty(size, *images.shape[1:]), labels.new_empty(size, *labels.shape[1:])
    start = 0
    for batch in stream(task, size, len(images)):
        for leaf, part in zip(whole, batch, strict=True):
            leaf[start : start + len(part)] = part
        start += len(batch[0])
    return task._replace(batch=whole)


def _by_microbatch(batch_size: int, sizes: Sequence[int], results: Results) -> Table:
    headings = [f"{name}, {what}" for name in CLIPPINGS for what in ("examples / s", "peak MB")]
    table = report.table(f"A logical batch of {batch_size}", "micro-batch", *headings)
    for size in sizes:
        points = [results[f"{name}/{size}"] for name in CLIPPINGS]
        shown = [(f"{p['throughput']:.1f}", report.megabytes(p["peak_bytes"])) for p in points]
        table.add_row(str(size), *(cell for pair in shown for cell in pair))
    return table


def _by_batch(microbatch: int, sizes: Sequence[int], found: dict[str, list[tuple[int, Point]]]) -> Table:
    table = report.table(f"Peak MB of a growing batch, micro-batches of {microbatch}", "batch", *found)
    for size in sizes:
        points = [dict(own).get(size, {"peak_bytes": None}) for own in found.values()]
        table.add_row(str(size), *(p.get("failure") or report.megabytes(p["peak_bytes"]) for p in points))
    return table


if __name__ == "__main__":
    main()
