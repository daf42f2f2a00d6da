"""The toy network of Rochette et al.: one batch, every strategy in turns."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import pegrad
from isolation import in_own_process
from pegrad import random, trees
from pegrad.papers import models
from pegrad.papers.comparison import interleaved
from pegrad.papers.training import cross_entropy, mean_grad
from pegrad.strategies import STRATEGIES, GroupedConv, Strategy
from pegrad.trees import PyTree
from runner import Effort, Point, spread

BASELINE = "non-private"
KERNELS = "grouped", "grouped_backward", "unfold"
STRATEGIES_OF_FIGURES: dict[str, Strategy] = {
    "vmap": STRATEGIES["vmap"],
    **{f"grouped_conv ({kernel})": GroupedConv(kernel) for kernel in KERNELS},
    "grouped_conv": STRATEGIES["grouped_conv"],
    "ghost": STRATEGIES["ghost"],
    "book_keeping": STRATEGIES["book_keeping"],
}
"""`grouped_conv (grouped)` is the paper's own kernel for every layer; `grouped_conv` picks one for each."""


def problem(sizes: Mapping[str, Any], batch_size: int, device: str) -> tuple[Any, PyTree, PyTree]:
    """Make the loss, fresh parameters, and a batch of standard normal images with uniform labels.

    Args:
        sizes: arguments of `pegrad.papers.models.toy_cnn`; `image_size` among them.
        batch_size: examples in the batch.
        device: where.
    """
    model = models.toy_cnn(**sizes)
    params_key, images_key = random.split(random.key(0))
    params = trees.map(lambda leaf: leaf.to(device), model.init(params_key))
    images = random.normal(images_key, (batch_size, 3, sizes["image_size"], sizes["image_size"]), device=device)
    labels = torch.arange(batch_size, device=device) % 10
    return cross_entropy(model), params, (images, labels)


def measure(
    sizes: Mapping[str, Any], batch_size: int, strategies: Mapping[str, Strategy], effort: Effort, device: str
) -> Point:
    """Time the clipped gradient by each strategy, and the non-private gradient, in turns in a process of its own.

    Returns:
        `seconds` of a batch, the medians by name, and `ratio`, their spread over the non-private gradient's.
    """
    arguments = sizes, batch_size, strategies, effort.rounds, device
    return in_own_process(_measure, *arguments, limit=effort.limit, device=device)


def _measure(
    sizes: Mapping[str, Any], batch_size: int, strategies: Mapping[str, Strategy], rounds: int, device: str
) -> Point:
    loss, params, batch = problem(sizes, batch_size, device)
    gradient = mean_grad(loss)
    functions: dict[str, Callable[[], Any]] = {BASELINE: partial(gradient, params, batch)}
    for name, strategy in strategies.items():
        clipped = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)
        functions[name] = partial(clipped, params, batch)
    times = interleaved(functions, rounds, device)
    return {
        "seconds": {name: spread(own)["median"] for name, own in times.items()},
        "ratio": {
            name: spread(o / b for o, b in zip(own, times[BASELINE], strict=True)) for name, own in times.items()
        },
    }
