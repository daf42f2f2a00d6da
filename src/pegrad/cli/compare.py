"""`python -m pegrad compare`: the strategies side by side, for one of the papers' networks."""

import argparse
import inspect

import torch
from rich.console import Console

from pegrad import random, trees
from pegrad.cli.tables import timings
from pegrad.papers import comparison
from pegrad.papers.models import MODELS
from pegrad.papers.training import cross_entropy
from pegrad.rules.conv import KERNELS
from pegrad.strategies import STRATEGIES, GroupedConv, Strategy

_KEY = random.key(0)  # times hardly depend on the numbers, so they may as well be the same each time


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: the image does not suit the model.
    """
    builder = MODELS[options.model]
    sizes = {name: parameter.default for name, parameter in inspect.signature(builder).parameters.items()}
    image_size = options.image_size or sizes["image_size"]
    model = builder(image_size=image_size)
    params_key, images_key = random.split(_KEY)
    params = trees.map(lambda leaf: leaf.to(options.device), model.init(params_key))
    shape = (options.batch_size, sizes["in_channels"], image_size, image_size)
    images = random.normal(images_key, shape, device=options.device)
    labels = torch.arange(len(images), device=options.device) % sizes["num_classes"]
    rows = comparison.compare(
        cross_entropy(model),
        params,
        (images, labels),
        _contestants(options),
        question=options.question,
        repeats=options.repeats,
    )
    title = f"{options.model}, {'×'.join(map(str, shape))}: {options.question}"
    Console().print(timings(title, rows))


def _contestants(options: argparse.Namespace) -> dict[str, Strategy]:
    chosen = {name: STRATEGIES[name] for name in options.strategies}
    kernels = {f"grouped_conv, {kernel}": GroupedConv(kernel) for kernel in KERNELS} if options.kernels else {}
    return {**chosen, **kernels}
