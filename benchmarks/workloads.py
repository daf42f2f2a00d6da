"""Named workloads: a network, the size of a batch and of an image, and the loss that every contestant computes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native
from pegrad import random, trees
from pegrad.papers import models
from pegrad.papers.models import Model
from pegrad.per_example import Loss
from pegrad.trees import PyTree


class Task(NamedTuple):
    """A workload made concrete: parameters and one batch on a device."""

    loss: Loss
    """`(params, (image, label)) -> scalar`, a pure function of one example."""
    params: PyTree
    batch: tuple[Tensor, Tensor]
    """Images `(B, C, H, W)` and labels `(B,)`."""
    build: Callable[[], nn.Module]

    def module(self) -> nn.Module:
        """The same network as a module, around the same parameters."""
        return native.twin(self.build, self.params)

    def first(self, count: int) -> "Task":
        """The same with only the first examples of the batch."""
        images, labels = self.batch
        return self._replace(batch=(images[:count], labels[:count]))

    def to(self, dtype: torch.dtype) -> "Task":
        """The same with parameters and images of another dtype."""
        images, labels = self.batch
        return self._replace(
            params=trees.map(lambda leaf: leaf.to(dtype), self.params), batch=(images.to(dtype), labels)
        )


@dataclass(frozen=True)
class Workload:
    """A network and its batch.

    Args:
        model: builds the network as a pair of pure functions.
        build: builds it as a module.
        batch_size: examples B in a batch.
        image_size: height and width of an image of 3 channels.
        num_classes: how many classes.
    """

    model: Callable[[], Model]
    build: Callable[[], nn.Module]
    batch_size: int
    image_size: int = 32
    num_classes: int = 10

    def task(self, device: torch.device | str) -> Task:
        """Draw parameters, standard normal images and uniform labels; the same ones for every call."""
        model = self.model()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
        labels = torch.randint(self.num_classes, (self.batch_size,), generator=generator)
        params = trees.map(lambda leaf: leaf.to(device), model.init(random.key(0)))

        def loss(params: PyTree, example: tuple[Tensor, Tensor]) -> Tensor:
            image, label = example
            return F.cross_entropy(model.apply(params, image), label)

        return Task(loss, params, (images.to(device), labels.to(device)), self.build)


def small_cnn(batch_size: int) -> Workload:
    """The small CNN at 32×32."""
    return Workload(models.small_cnn, native.small_cnn, batch_size)


def vgg(depth: int, batch_size: int) -> Workload:
    """A VGG at 32×32."""
    return Workload(partial(models.vgg, depth), partial(native.vgg, depth), batch_size)


def resnet(depth: int, batch_size: int) -> Workload:
    """A ResNet with group norm at 32×32."""
    return Workload(partial(models.resnet, depth), partial(native.resnet, depth), batch_size)


_WRN = partial(models.wrn, 16, 4, weight_standardisation=False), partial(native.wrn, 16, 4)
_VGG16_IMAGENET = partial(models.vgg_imagenet, 16), partial(native.vgg_imagenet, 16)

# The rows of the tables, with the batch sizes that two cores and 24 GB can take.
TABLE = {
    "small_cnn": small_cnn(256),
    "vgg11": vgg(11, 128),
    "vgg16": vgg(16, 128),
    "vgg19": vgg(19, 64),
    "resnet18": resnet(18, 64),
    "wrn16_4": Workload(*_WRN, 64),
    "vit": Workload(models.vit, native.vit, 64),
    "alexnet_224": Workload(models.alexnet, native.alexnet, 16, 224, 1000),
    "vgg16_224": Workload(*_VGG16_IMAGENET, 8, 224, 1000),
}

_LARGE = {
    f"{name}_b256": replace(workload, batch_size=256) for name, workload in TABLE.items() if workload.image_size == 32
}

SCALES: dict[str, dict[str, Workload]] = {
    "smoke": {"tiny": small_cnn(4)},
    "cpu": TABLE,
    # On a GPU: the same rows, and those of 32x32 at the batch size of the literature.
    "full": TABLE | {name: large for name, large in _LARGE.items() if name != "small_cnn_b256"},
}
