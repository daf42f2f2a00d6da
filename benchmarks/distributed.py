"""Private steps on 1, 2 and 4 processes of this machine: time, memory and bytes sent by rank, and a projection.

    python benchmarks/distributed.py [--scale smoke|cpu]

The rows of one batch are split over the ranks, by `data_parallel`, with parameters whole or in shards and sums in
floating or in fixed point. Processes that share this machine's cores are not faster together: CPU time shows what
distribution adds, wall time nothing else. Bytes are those of the loopback device while the steps run, of all ranks
together, beside the least that any algorithm must send.

Then two stages of a small convolutional network are a pipeline of two ranks, by schedule and size of micro-batch: how
long a rank waits, beside the bubble `(K - 1) / (M + K - 1)` that M equal micro-batches leave in K equal stages, and
what it needs at its peak (Lee et al. 2021, NanoBatch).

The projection is arithmetic: what one process computes, divided by the ranks or not, and what the sums take to send,
from the latency and bandwidth that were measured here or are given (`--latency`, `--bandwidth`).
"""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pegrad
import report
import runner
from isolation import peak
from pegrad import optim, random, trees
from pegrad.distributed import ExactSum, FastSum, data_parallel, pipeline, shard, split
from pegrad.sampling import Draw
from runner import Effort, Point, Results, spread

EFFORTS = {"smoke": Effort(rounds=1), "cpu": Effort(rounds=7)}
WIDTHS = {"smoke": (16, 32, 10), "cpu": (784, 2048, 2048, 10)}
BATCH = {"smoke": 8, "cpu": 64}
RANKS = 1, 2, 4
PROJECTED = 8, 64, 1024
MICROBATCHES = {"smoke": (2, 4), "cpu": (1, 2, 4, 8, 16, 32)}
SCHEDULES = "GPipe", "1F1B"
STAGES = 2
WAYS: dict[str, tuple[bool, Any]] = {
    "whole": (False, FastSum),
    "whole, exact": (False, ExactSum),
    "shards": (True, FastSum),
    "shards, exact": (True, ExactSum),
}
"""By name: whether parameters are sharded, and how sums are added up."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the tables."""
    parser = runner.parser("Private steps on several processes.", EFFORTS)
    parser.add_argument("--latency", type=float, help="seconds of one message, for the projection (measured)")
    parser.add_argument("--bandwidth", type=float, help="bytes a second between two ranks, likewise (measured)")
    options = runner.parse(parser, argv)
    scale, rounds = options.scale, options.effort.rounds
    path = options.out / f"distributed_{scale}_cpu.json"
    settings = {"widths": WIDTHS[scale], "batch": BATCH[scale], "rounds": rounds, "threads_of_a_rank": 1}
    results = Results(path, settings, "cpu", fresh=options.fresh)
    points: dict[str, Callable[[], Point]] = {
        f"{way}/{ranks}": partial(on_ranks, ranks, steps, scale, way, rounds) for way in WAYS for ranks in RANKS
    }
    points |= {
        f"{schedule}/{size}": partial(on_ranks, STAGES, staged, scale, schedule, size, rounds)
        for schedule in SCHEDULES
        for size in MICROBATCHES[scale]
    }
    points["link"] = partial(on_ranks, 2, link, rounds)
    points["parts"] = partial(on_ranks, 1, parts, scale, rounds)
    runner.run(points, results)
    console = Console(width=110)
    console.print(_measured(results))
    console.print(_pipelines(results, scale))
    found = results["link"]
    latency, bandwidth = options.latency or found["latency"], options.bandwidth or found["bandwidth"]
    console.print(_projection(results["parts"], latency, bandwidth))
    print(path)


def on_ranks(ranks: int, job: Callable[..., Point], *args: Any) -> Point:
    """Run a job on so many fresh processes, each with one thread, and return what the first rank says."""
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "store").as_uri()
        started = [
            context.Process(target=_rank, args=(rank, ranks, meeting, answers, job, args)) for rank in range(ranks)
        ]
        for process in started:
            process.start()
        point = answers.get()
        for process in started:
            process.join()
    if isinstance(point, Exception):
        raise point
    return point


def _rank(rank: int, ranks: int, meeting: str, answers: Any, job: Callable[..., Point], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    try:
        answer: Any = job(*args)
    except Exception as error:
        answer = error
    if rank == 0:
        answers.put(answer)
    dist.barrier()
    dist.destroy_process_group()


def network(widths: Sequence[int]) -> tuple[Any, dict[str, Tensor]]:
    """Make a loss of fully connected layers, most of whose time and memory is that of its parameters."""
    generator = torch.Generator().manual_seed(0)
    params = {
        f"{index}": torch.randn(o, i, generator=generator) / i**0.5 for index, (i, o) in enumerate(pairwise(widths))
    }

    def loss(params: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        x, label = example
        for index in range(len(params) - 1):
            x = F.linear(x, params[f"{index}"]).relu()
        return F.cross_entropy(F.linear(x, params[f"{len(params) - 1}"]), label)

    return loss, params


def steps(scale: str, way: str, rounds: int) -> Point:
    """Take steps on this rank.

    Returns:
        By rank: `cpu_seconds` and `seconds` of a step, medians, `peak_bytes` of one, and `kept_bytes`, what parameters
        and optimizer state take. `sent_bytes` of a step over the loopback device, all ranks together.
    """
    sharded, summation = WAYS[way]
    loss, params = network(WIDTHS[scale])
    rows = BATCH[scale]
    params = shard(params) if sharded else params
    step = data_parallel(_private(loss, rows), summation=summation)
    state = step.init(params, random.key(1))
    (share,) = split(Draw(torch.arange(rows), torch.ones(rows, dtype=torch.bool)))
    mine = share.indices
    batch = (torch.randn(rows, WIDTHS[scale][0], generator=torch.Generator().manual_seed(1)), torch.arange(rows) % 10)
    batch = tuple(leaf[mine] for leaf in batch)
    kept = sum(_local(leaf).nbytes for leaf in trees.leaves((params, state.optimizer)) if isinstance(leaf, Tensor))

    def take() -> None:
        step(params, state, batch, share)

    _, needed = peak(take, "cpu")
    gc.collect()
    times: list[tuple[float, float]] = []
    dist.barrier()
    before = _sent()
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        take()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    dist.barrier()
    sent = None if before is None else (_sent() or 0) - before
    cpu, wall = (spread(column)["median"] for column in zip(*times, strict=True))
    own = {"cpu_seconds": cpu, "seconds": wall, "peak_bytes": needed, "kept_bytes": kept}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return {
        "by_rank": by_rank,
        "sent_bytes": None if sent is None else sent / rounds,
        "least_bytes": least_bytes(trees.leaves(params), summation is ExactSum, sharded, dist.get_world_size()),
    }


def _private(loss: Any, rows: int) -> pegrad.DPSGD:
    return pegrad.dp_sgd(loss, optim.adam(1e-3), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=rows)


def _local(leaf: Any) -> Tensor:
    return leaf.to_local() if hasattr(leaf, "to_local") else leaf


def _sent() -> int | None:
    """Return how many bytes the loopback device has carried, or None where the system does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), None)


def least_bytes(params: Sequence[Tensor], exact: bool, sharded: bool, ranks: int) -> int:
    """Bound from below what all ranks send in a step: sums out and in, and where parameters are sharded those in."""
    numbers = sum(leaf.numel() for leaf in params)
    sums = numbers * (8 if exact else 4)
    return (ranks - 1) * ((sums + numbers * 4) if sharded else 2 * sums)


def stages() -> tuple[list[Callable[..., Tensor]], list[dict[str, Tensor]]]:
    """Make two stages of a convolutional network for images (3, 32, 32), and their parameters."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5

    def first(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for name in params:
            x = F.conv2d(x, params[name], padding=1).relu()
        return F.max_pool2d(x, 2)

    def second(params: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        x, label = example
        x = F.max_pool2d(F.conv2d(x, params["conv"], padding=1).relu(), 4)
        return F.cross_entropy(F.linear(x.flatten(), params["head"]), label)

    return [first, second], [
        {"conv1": weight(16, 3, 3, 3), "conv2": weight(16, 16, 3, 3)},
        {"conv": weight(64, 16, 3, 3), "head": weight(10, 64 * 16)},
    ]


def staged(scale: str, schedule: str, size: int, rounds: int) -> Point:
    """Find a clipped gradient by a pipeline.

    Returns:
        By rank: `waits`, the part of the time in which it does not compute, and `peak_bytes`. And `bubble`, what that
        part would be if the stages were equal.
    """
    functions, params = stages()
    rows = BATCH[scale]
    batch = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(rows) % 10
    clipped = pipeline(functions, clip_norm=1.0, microbatch_size=size, schedule=schedule)
    mine = [params[index] for index in clipped.local]

    def run() -> None:
        clipped(mine, batch)

    run()  # sets up what the schedule needs
    _, needed = peak(run, "cpu")
    waits = []
    for _ in range(rounds):
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        waits.append(1 - (time.process_time() - cpu) / (time.perf_counter() - wall))
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, {"waits": spread(waits)["median"], "peak_bytes": needed})
    microbatches = rows // size
    return {"by_rank": by_rank, "bubble": (STAGES - 1) / (microbatches + STAGES - 1)}


def link(rounds: int) -> Point:
    """Measure `latency`, the seconds of a small all-reduce over 2 ranks, and `bandwidth`, bytes a second of a large."""

    def timed(numbers: int) -> float:
        tensor = torch.ones(numbers)
        dist.all_reduce(tensor)
        taken = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            taken.append(time.perf_counter() - start)
        return spread(taken)["median"]

    numbers = 1 << 22
    return {"latency": timed(1) / 2, "bandwidth": 4 * numbers / timed(numbers)}


def parts(scale: str, rounds: int) -> Point:
    """Measure on one process the seconds of the `gradient` of the batch, the `noise` and the `update`."""
    loss, params = network(WIDTHS[scale])
    rows = BATCH[scale]
    batch = torch.randn(rows, WIDTHS[scale][0]), torch.arange(rows) % 10
    step = _private(loss, rows)
    state = step.init(params, random.key(1))
    noise = random.tree_normal(random.key(2), params)
    measured = {
        "gradient": lambda: step.clipped_grad(params, batch),
        "noise": lambda: random.tree_normal(random.key(2), params),
        "update": lambda: step.updated(params, [noise], state),
    }
    found = {}
    for name, run in measured.items():
        run()
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        found[name] = spread(taken)["median"]
    return {**found, "bytes": 4 * sum(leaf.numel() for leaf in params.values())}


def projected(parts: Mapping[str, float], ranks: int, sharded: bool, latency: float, bandwidth: float) -> float:
    """Work out the seconds of a step whose rows are split over so many ranks, each like this machine's one thread.

    Whole parameters: every rank makes all the noise and the whole update, and a ring adds up the sums. Shards: noise
    and update are split; parameters are gathered and sums scattered, which sends as much.
    """
    of_all = parts["noise"] + parts["update"]
    rounds = 2 * (ranks - 1)
    sending = rounds * latency + rounds / ranks * parts["bytes"] / bandwidth
    return parts["gradient"] / ranks + (of_all / ranks if sharded else of_all) + sending


def _measured(results: Results) -> Table:
    title = "a private step by rank; all ranks share this machine's cores"
    made = report.table(
        title, "parameters", "ranks", "CPU s a rank", "× 1 rank", "peak MB", "kept MB", "sent MB", "× least"
    )
    for way in WAYS:
        for ranks in RANKS:
            point = results[f"{way}/{ranks}"]
            own = point["by_rank"]
            cpu = sum(each["cpu_seconds"] for each in own)
            alone = results[f"{way}/1"]["by_rank"][0]["cpu_seconds"]
            sent, least = point["sent_bytes"], point["least_bytes"]
            made.add_row(
                way,
                str(ranks),
                f"{cpu / ranks:.3f}",
                f"{cpu / ranks / alone:.2f}",
                report.megabytes(max((each["peak_bytes"] or 0 for each in own), default=0)),
                report.megabytes(max(each["kept_bytes"] for each in own)),
                "" if sent is None else f"{sent / 1e6:.1f}",
                f"{sent / least:.2f}" if sent and least else "",
            )
    return made


def _pipelines(results: Results, scale: str) -> Table:
    made = report.table(
        f"a pipeline of {STAGES} stages, one clip norm; batch {BATCH[scale]}",
        *(
            "schedule",
            "micro-batch",
            "bubble of equal stages",
            "rank 0 waits",
            "rank 1 waits",
            "peak MB, rank 0",
            "rank 1",
        ),
    )
    for schedule in SCHEDULES:
        for size in MICROBATCHES[scale]:
            point = results[f"{schedule}/{size}"]
            waits = [f"{own['waits']:.0%}" for own in point["by_rank"]]
            peaks = [report.megabytes(own["peak_bytes"]) for own in point["by_rank"]]
            made.add_row(schedule, str(size), f"{point['bubble']:.0%}", *waits, *peaks)
    return made


def _projection(parts: Mapping[str, float], latency: float, bandwidth: float) -> Table:
    title = f"projected seconds of a step: {latency * 1e6:.0f} µs a message, {bandwidth / 1e9:.2f} GB/s"
    made = report.table(title, "parameters", *(f"{ranks} ranks" for ranks in (1, *PROJECTED)))
    for name, sharded in ("whole", False), ("shards", True):
        row = [f"{projected(parts, ranks, sharded, latency, bandwidth):.4f}" for ranks in (1, *PROJECTED)]
        made.add_row(name, *row)
    return made


if __name__ == "__main__":
    main()
