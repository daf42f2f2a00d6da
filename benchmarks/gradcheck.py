"""The gradient check of Rochette et al. 2019: the mean gradient over the first 5 batches, by every strategy.

    python benchmarks/gradcheck.py [--scale smoke|cpu|full]

prints each strategy's largest relative difference from the loop over examples, in float32 and in float64.
"""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

import pegrad
import runner
import toy
from pegrad import trees
from pegrad.papers.comparison import relative_difference
from pegrad.strategies import STRATEGIES
from pegrad.trees import PyTree
from runner import Effort, Point, Results

_ONCE = Effort(rounds=1)
IMAGE_SIZES = {"smoke": 8, "cpu": 32, "full": 256}
BATCHES, BATCH_SIZE = 5, 8


def main(argv: Sequence[str] | None = None) -> None:
    """Compare what is missing, and print the table."""
    efforts = dict.fromkeys(IMAGE_SIZES, _ONCE)
    options = runner.parse(runner.parser("The gradient check of Rochette et al. 2019.", efforts), argv)
    path = options.out / f"gradcheck_{options.scale}_{options.device}.json"
    sizes = {"layers": 3, "image_size": IMAGE_SIZES[options.scale]}
    results = Results(path, sizes | {"batches": BATCHES}, options.device, fresh=options.fresh)
    runner.run({"gradcheck": lambda: differences(sizes, options.device)}, results)
    table = Table(
        "strategy", "float32", "float64", title=f"Difference from the loop, {BATCHES} batches of {BATCH_SIZE}"
    )
    for name, found in results["gradcheck"]["differences"].items():
        table.add_row(name, f"{found['float32']:.1e}", f"{found['float64']:.1e}")
    Console(width=100).print(table)
    print(path)


def differences(sizes: dict[str, int], device: str) -> Point:
    """Find each strategy's difference from `naive`: `differences`, by strategy and dtype."""
    found: dict[str, dict[str, float]] = {name: {} for name in STRATEGIES if name != "naive"}
    for dtype in (torch.float32, torch.float64):
        reference = mean_gradient("naive", sizes, dtype, device)
        for name, by_dtype in found.items():
            mean = mean_gradient(name, sizes, dtype, device)
            by_dtype[str(dtype).removeprefix("torch.")] = relative_difference(mean, reference)
    return {"differences": found}


def mean_gradient(strategy: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> PyTree:
    """Compute the mean gradient over the batches by a strategy."""
    loss, params, (images, labels) = toy.problem(sizes, BATCHES * BATCH_SIZE, device)
    params, images = trees.map(lambda leaf: leaf.to(dtype), params), images.to(dtype)
    stacked = pegrad.per_example_grad(loss, strategy=strategy)
    batches = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    return trees.map(lambda *leaves: torch.cat(leaves).mean(0), *(stacked(params, batch) for batch in batches))


if __name__ == "__main__":
    main()
