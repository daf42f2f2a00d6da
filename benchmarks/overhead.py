"""What a call costs beside its arithmetic: tracing and planning, where a batch is so small that they show.

    python benchmarks/overhead.py [--scale smoke|cpu|full]

The MNIST network of Rochette et al. at batch sizes of 1 to 64. Tracing is what the traced forward pass takes more than
the same loss under `torch.func.vmap`, recorded by autograd, as any gradient needs it; planning is from the trace to the
backward pass. Both are shown as shares of the clipped gradient and of the whole private step. All of it in turns, in
one process.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import vmap

import pegrad
import report
import runner
from contest import CLIP_NORM
from pegrad import random, trees
from pegrad.call import Call
from pegrad.papers.comparison import interleaved
from pegrad.papers.models import mnist_cnn
from pegrad.plan.plan import Plan
from pegrad.strategies import BookKeeping
from pegrad.trees import PyTree
from runner import Effort, Point, Results, spread

EFFORTS = {"smoke": Effort(rounds=3), "cpu": Effort(rounds=100), "full": Effort(rounds=500)}
BATCH_SIZES = {"smoke": [1], "cpu": [1, 8, 64], "full": [1, 8, 64]}
SHARES = {"clipped gradient": "of the gradient", "private step": "of the step"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure if need be, and print the table."""
    options = runner.parse(runner.parser("Tracing and planning, as shares of a call.", EFFORTS), argv)
    path = options.out / f"overhead_{options.scale}_{options.device}.json"
    settings = {"rounds": options.effort.rounds, "allocator": options.allocator}
    results = Results(path, settings, options.device, fresh=options.fresh)
    sizes = BATCH_SIZES[options.scale]
    runner.run({f"B={b}": lambda b=b: _measure(b, options.effort.rounds, options.device) for b in sizes}, results)
    table = Table("batch", "tracing, ms", "planning, ms", *SHARES.values(), title="MNIST network, per call")
    for b in sizes:
        point = results[f"B={b}"]
        parts = (f"{1e3 * point['seconds'][name]:.2f}" for name in ("tracing", "planning"))
        table.add_row(str(b), *parts, *(report.with_quartiles(point["share"][whole]) for whole in SHARES))
    Console(width=100).print(table)
    print(path)


def _measure(size: int, rounds: int, device: str) -> Point:
    times = interleaved(_functions(size, device), rounds, device)
    times["tracing"] = [a - b for a, b in zip(times.pop("traced"), times.pop("vmap"), strict=True)]
    both = [a + b for a, b in zip(times["tracing"], times["planning"], strict=True)]
    shares = {whole: spread(o / w for o, w in zip(both, times[whole], strict=True)) for whole in SHARES}
    return {"seconds": {name: median(own) for name, own in times.items()}, "share": shares}


def _functions(size: int, device: str) -> dict[str, Callable[[], Any]]:
    model = mnist_cnn()
    params = trees.map(lambda leaf: leaf.to(device), model.init(random.key(0)))
    batch = torch.randn(size, 1, 28, 28, device=device), torch.arange(size, device=device) % 10

    def loss(params: PyTree, example: tuple[Tensor, Tensor]) -> Tensor:
        image, label = example
        return F.cross_entropy(model.apply(params, image), label)

    strategy = BookKeeping()
    trace = strategy.trace(Call.of(loss, params, batch, None).problem)
    step = pegrad.dp_sgd(
        loss, pegrad.optim.sgd(0.1), clip_norm=CLIP_NORM, noise_multiplier=1.0, expected_batch_size=size
    )
    state = step.init(params, random.key(1))
    recorded = trees.map(lambda leaf: leaf.clone().requires_grad_(), params)
    return {
        "vmap": lambda: vmap(loss, (None, 0))(recorded, batch),
        "traced": lambda: strategy.trace(Call.of(loss, params, batch, None).problem),
        "planning": lambda: Plan(trace, strategy.choose),
        "clipped gradient": lambda: step.clipped_grad(params, batch),
        "private step": lambda: step(params, state, batch),
    }


if __name__ == "__main__":
    main()
