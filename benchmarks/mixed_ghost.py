"""Mixed ghost clipping (Bu, Mao & Xu 2022): time, memory, the largest batch, and the choice at every layer.

    python benchmarks/mixed_ghost.py [--scale smoke|cpu|full] [--only MODEL ...]

Four contestants are ghost clipping that differs in one thing, the norms' kernel: always Gram matrices (`ghost only`),
always stacked gradients (`instantiate only`), the published rule, and our cost model (`ghost`). Writes JSON, a picture
of time, memory and largest batch, and one of the choice: which kernel was fastest at each layer, beside the rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

import pegrad
import plotting
import report
import runner
from choices import positions, prefers_ghost
from contest import CLIP_NORM, contest
from contestants import BASELINE, EVERYONE
from isolation import FailedError, in_own_process, peak
from pegrad import trees
from pegrad.explain import Use
from runner import Effort, Point, Results
from workloads import SCALES, Workload, resnet, small_cnn, vgg

Layer = dict[str, Any]
EFFORTS = {
    "smoke": Effort(rounds=1),
    "cpu": Effort(rounds=3, budget=5, limit=120),
    "full": Effort(rounds=15, budget=60),
}
CONTESTANTS = BASELINE, "ghost only", "instantiate only", "mixed, published rule", "ghost", "book_keeping", "Opacus"
MEMORY = {"smoke": 5e7, "cpu": 5e8, "full": 15e9}
"""Bytes that a call may need, beside parameters and batch, for the question of the largest batch."""


def models(batch_size: int, deep_batch_size: int) -> dict[str, Workload]:
    """List the networks of Bu, Mao & Xu, of which the two deepest have batches of their own."""
    return {
        "small_cnn": small_cnn(batch_size),
        **{f"vgg{depth}": vgg(depth, batch_size) for depth in (11, 13, 16, 19)},
        "resnet18": resnet(18, batch_size),
        **{f"resnet{depth}": resnet(depth, deep_batch_size) for depth in (34, 50)},
    }


WORKLOADS = {"smoke": SCALES["smoke"], "cpu": models(32, 16), "full": models(256, 256)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("Mixed ghost clipping: time, memory, largest batch, choices.", EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these networks; all of the scale's")
    options = runner.parse(parser, argv)
    workloads = {name: WORKLOADS[options.scale][name] for name in options.only or WORKLOADS[options.scale]}
    room = MEMORY[options.scale]
    stem = options.out / f"mixed_ghost_{options.scale}_{options.device}"
    settings = {"clip_norm": CLIP_NORM, "allocator": options.allocator, "memory": room}
    results = Results(
        stem.with_suffix(".json"), settings | options.effort._asdict(), options.device, fresh=options.fresh
    )
    how = {"effort": options.effort, "device": options.device}
    with TemporaryDirectory() as folder:
        points = {}
        for row, workload in workloads.items():
            for name in CONTESTANTS:
                references = Path(folder, row)
                points[f"time/{row}/{name}"] = partial(contest, name, row, workload, **how, references=references)
                points[f"batch/{row}/{name}"] = partial(largest_batch, name, workload, room, **how)
            points[f"choice/{row}"] = partial(choices, workload, **how)
        runner.run(points, results)
    measured = {
        row: {
            name: report.joined(results[f"time/{row}/{name}"], results[f"batch/{row}/{name}"]) for name in CONTESTANTS
        }
        for row in workloads
    }
    batches = {row: {name: results[f"batch/{row}/{name}"] for name in CONTESTANTS} for row in workloads}
    layers = {row: results[f"choice/{row}"].get("layers", []) for row in workloads}
    console = Console(width=130)
    for row, points in measured.items():
        console.print(report.gradient_table(report.caption(row, workloads[row]), points))
    limit = f"{room / 1e9:g} GB"
    console.print(_batches(f"The largest batch within {limit}", batches))
    console.print(_choices_table(layers))

    ratios = report.ratios(measured, workloads)
    ratios[f"largest batch, {limit}"] = {
        report.caption(row, workloads[row]): {
            name: (point["largest"] / points[BASELINE]["largest"],) * 3
            for name, point in points.items()
            if name != BASELINE and point.get("largest")
        }
        for row, points in batches.items()
    }
    plotting.ratio_dots(ratios, "Clipped gradient over non-private gradient", results.where()).savefig(
        stem.with_suffix(".png")
    )
    choice_picture = stem.with_name(f"{stem.name}_choice.png")
    plotting.choices(layers, "The fastest kernel for the norms at every layer", results.where()).savefig(choice_picture)
    console.print(f"{stem}.json, {stem}.png, {choice_picture}", soft_wrap=True)


def _batches(title: str, batches: Mapping[str, Mapping[str, Point]]) -> Table:
    made = report.table(title, "network", *CONTESTANTS)
    for row, points in batches.items():
        made.add_row(row, *(str(points[name].get("largest", points[name].get("failure"))) for name in CONTESTANTS))
    return made


def _choices_table(layers: Mapping[str, list[Layer]]) -> Table:
    """How often the published rule, and the cost model, name the kind of the fastest kernel; and what erring costs."""
    made = report.table("Norms at the layers", "network", "layers", "rule right", "its cost", "ours right", "its cost")
    for row, found in layers.items():
        if not found:
            continue
        best = sum(min(layer["times"].values()) for layer in found)
        cells = []
        for chosen in ([kernel_by_rule(layer) for layer in found], [layer["estimated"] for layer in found]):
            right = sum(
                is_gram(kernel) == is_gram(layer["fastest"]) for kernel, layer in zip(chosen, found, strict=True)
            )
            time = sum(layer["times"][kernel] for kernel, layer in zip(chosen, found, strict=True))
            cells += [str(right), f"{time / best:.2f}"]
        made.add_row(row, str(len(found)), *cells)
    return made


def is_gram(kernel: str) -> bool:
    """Whether a kernel finds norms from Gram matrices; the others stack gradients."""
    return kernel.startswith("gram")


def kernel_by_rule(layer: Layer) -> str:
    """The fastest kernel of the kind that the published rule names: the best that it can do."""
    of_kind = {kernel: time for kernel, time in layer["times"].items() if is_gram(kernel) == (layer["rule"] == "gram")}
    return min(of_kind, key=of_kind.__getitem__)


def largest_batch(name: str, workload: Workload, memory: float, effort: Effort, device: str) -> Point:
    """Find how many examples a contestant can take within a number of bytes.

    Returns:
        `failure`; or `peak_bytes` of the workload's own batch, `largest`, the largest batch that was seen to fit, and
        `tried`, the peak bytes by batch size.
    """
    try:
        return in_own_process(_largest_batch, name, workload, memory, device, limit=effort.limit, device=device)
    except FailedError as error:
        return {"failure": str(error)}


def _largest_batch(name: str, workload: Workload, memory: float, device: str) -> Point:
    def needs(size: int) -> int:
        call = EVERYONE[name].make(replace(workload, batch_size=size).task(device), CLIP_NORM)
        _, found = peak(call, device)
        if found is None:
            raise NotImplementedError("the system cannot tell peak memory")
        return found

    needs(1)  # what is loaded once is not in what follows
    tried: dict[int, int] = {}
    size: int | None = workload.batch_size
    while size is not None and len(tried) < 8:
        tried[size] = needs(size)
        size = next_batch(tried, memory)
    fitting = [size for size, found in tried.items() if found <= memory]
    return {
        "peak_bytes": tried[workload.batch_size],
        "largest": max(fitting, default=0),
        "tried": {str(size): tried[size] for size in sorted(tried)},
    }


def next_batch(tried: Mapping[int, int], memory: float) -> int | None:
    """Say which batch to try next: peaks are nearly affine in its size, but small ones tell little of large ones.

    Args:
        tried: peak bytes by batch size, one at least.
        memory: bytes that a batch must fit into.

    Returns:
        A size between the largest that fits and the smallest that does not; None once the former needs 98% of the
        memory, or there is none between.
    """
    fits = max((size for size, found in tried.items() if found <= memory), default=0)
    over = min((size for size, found in tried.items() if found > memory), default=4 * fits)
    if over - fits <= 1 or tried.get(fits, 0) > 0.98 * memory:
        return None
    at_fits, at_over = tried.get(fits, 0), tried.get(over, 4 * tried.get(fits, 0))
    guess = fits + (over - fits) * (0.99 * memory - at_fits) / (at_over - at_fits)
    return min(max(int(guess), fits + 1), over - 1 if over in tried else over)


def choices(workload: Workload, effort: Effort, device: str) -> Point:
    """Time every norm kernel at every layer.

    Returns:
        `failure`; or `layers`, one for each use of a weight: its name, `positions` T, `numbers` D p, the kernel that
        was `fastest` and all `times` in milliseconds, the cost model's choice `estimated`, and `rule`, the published
        one's: "gram" or "stack".
    """
    try:
        return in_own_process(_choices, workload, device, limit=10 * effort.limit, device=device)
    except FailedError as error:
        return {"failure": str(error)}


def _choices(workload: Workload, device: str) -> Point:
    loss, params, batch, _ = workload.task(device)
    shapes = {
        f"params{path}": tuple(leaf.shape) for path, leaf in zip(trees.paths(params), trees.leaves(params), strict=True)
    }
    by_model = pegrad.explain(loss, params, batch, strategy="ghost").uses
    tuned = pegrad.autotune(loss, params, batch, strategy="ghost", repeats=2)
    measured = pegrad.explain(loss, params, batch, strategy=tuned).uses
    return {
        "layers": [
            _layer(fastest, estimated.norm, shapes[fastest.leaves])
            for fastest, estimated in zip(measured, by_model, strict=True)
            if len({candidate.stacks for candidate in fastest.candidates}) > 1
        ]
    }


def _layer(fastest: Use, estimated: str, weight: tuple[int, ...]) -> Layer:
    return {
        "name": fastest.leaves,
        "positions": positions(weight, fastest.g),
        "numbers": prod(weight),
        "fastest": fastest.norm,
        "times": {candidate.norm: candidate.norm_time / 1e6 for candidate in fastest.candidates},
        "estimated": estimated,
        "rule": "gram" if prefers_ghost(weight, fastest.g) else "stack",
    }


if __name__ == "__main__":
    main()
