"""One of the papers' networks with random images, for commands that need some batch, whatever is in it."""

import argparse
import inspect
from typing import NamedTuple

import torch

from pegrad import random, trees
from pegrad.papers.models import MODELS
from pegrad.papers.training import cross_entropy
from pegrad.per_example import Loss
from pegrad.trees import PyTree

_KEY = random.key(0)  # neither times nor choices depend on the numbers, so they may as well be the same each time


class Network(NamedTuple):
    """A network's loss, parameters and a batch."""

    loss: Loss
    params: PyTree
    batch: tuple[torch.Tensor, torch.Tensor]
    title: str
    """The model's name and the shape of the images."""


def build(options: argparse.Namespace) -> Network:
    """Build what `--model`, `--image-size`, `--batch-size` and `--device` ask for.

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
    return Network(cross_entropy(model), params, (images, labels), f"{options.model}, {'×'.join(map(str, shape))}")
