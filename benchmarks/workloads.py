"""Named workloads: a network, the size of a batch and of an image, and the loss that every contestant computes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native
import pegrad
import shapes
from pegrad import random, trees
from pegrad.papers import models
from pegrad.papers.models import Model
from pegrad.per_example import Loss
from pegrad.trees import PyTree


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example `(B,)`, the mean over its labels: of logits `(B, ..., C)` and labels `(B, ...)`."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(len(labels), -1).mean(1)


class Task(NamedTuple):
    """A workload made concrete: parameters and one batch on a device."""

    loss: Loss
    """`(params, (image, label)) -> scalar`, a pure function of one example."""
    params: PyTree
    batch: tuple[Tensor, Tensor]
    """Images `(B, C, H, W)` or other inputs, and labels `(B, ...)`."""
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
        images = images.to(dtype) if images.is_floating_point() else images
        return self._replace(params=trees.map(lambda leaf: leaf.to(dtype), self.params), batch=(images, labels))


class ModuleTask(Task):
    """A workload whose network is a module: parameters by name, those that are trained."""

    def module(self) -> nn.Module:
        """The module around the same parameters, in their dtype."""
        leaf = next(iter(self.params.values()))
        module = self.build().to(leaf.device, leaf.dtype)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data = self.params[name]
        return module

    def to(self, dtype: torch.dtype) -> "Task":
        """The same in another dtype, what is frozen as well."""
        task = Task.to(self, dtype)
        return task._replace(loss=_loss_of(self.build().to(self.batch[0].device, dtype)))


def _loss_of(module: nn.Module) -> Loss:
    apply, _ = pegrad.from_module(module)

    def loss(params: PyTree, example: tuple[Tensor, Tensor]) -> Tensor:
        x, label = example
        return cross_entropies(apply(params, x)[None], label[None])[0]

    return loss


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

    @property
    def size(self) -> str:
        """The size of an example, as a caption has it."""
        return f"{self.image_size}²"

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


@dataclass(frozen=True)
class ModuleWorkload:
    """A module and its batch.

    Args:
        make: builds the network, with random parameters.
        batch_size: examples B in a batch.
        shape: of one example's input.
        predictions: shape of one example's labels.
        vocabulary: how many token ids there are; None: the input is of normal numbers.
        padded: whether the ends of sequences are padding, id 0, of up to half the length.
        num_classes: how many classes.
    """

    make: Callable[[], nn.Module]
    batch_size: int
    shape: tuple[int, ...]
    predictions: tuple[int, ...] = ()
    vocabulary: int | None = None
    padded: bool = False
    num_classes: int = 10

    @property
    def size(self) -> str:
        """The size of an example, as a caption has it."""
        return "×".join(map(str, self.shape))

    def build(self) -> nn.Module:
        """The network; the same parameters for every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def task(self, device: torch.device | str) -> Task:
        """Draw parameters, inputs and uniform labels; the same ones for every call."""
        generator = torch.Generator().manual_seed(0)
        size = self.batch_size, *self.shape
        if self.vocabulary is None:
            inputs = torch.randn(size, generator=generator)
        else:
            inputs = torch.randint(1, self.vocabulary, size, generator=generator)
        if self.padded:
            length = self.shape[0]
            lengths = torch.randint(length // 2, length + 1, (self.batch_size, 1), generator=generator)
            inputs = inputs.where(torch.arange(length) < lengths, 0)
        labels = torch.randint(self.num_classes, (self.batch_size, *self.predictions), generator=generator)
        module = self.build().to(device)
        params = {name: leaf.detach() for name, leaf in module.named_parameters() if leaf.requires_grad}
        return ModuleTask(_loss_of(module), params, (inputs.to(device), labels.to(device)), self.build)


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


def shapes_of(dim: int, layers: int, vocabulary: int, length: int, image: int, batch: int) -> dict[str, ModuleWorkload]:
    """What people train beyond the tables' networks: transformers, recurrent networks, augmentations, adapters."""
    language = {"vocabulary": vocabulary, "num_classes": vocabulary, "shape": (length,), "predictions": (length,)}
    bert = partial(shapes.Bert, vocabulary, 2 * length, dim, layers)
    llama = partial(shapes.Llama, vocabulary, dim, layers)
    recurrent = {"shape": (50, dim // 6), "batch_size": 4 * batch}
    return {
        "bert": ModuleWorkload(bert, batch, (2 * length,), vocabulary=vocabulary, padded=True),
        "gpt2": ModuleWorkload(partial(shapes.Gpt2, vocabulary, length, dim, layers), batch, **language),
        "llama": ModuleWorkload(llama, batch, **language),
        "lora": ModuleWorkload(partial(llama, lora=True), batch, **language),
        "vit_b16_224": ModuleWorkload(partial(shapes.Vit, image, 16, dim, layers), batch // 2, (3, image, image)),
        "lstm": ModuleWorkload(partial(shapes.Recurrent, nn.LSTM, dim // 6, 2), **recurrent),
        "gru": ModuleWorkload(partial(shapes.Recurrent, nn.GRU, dim // 6, 2), **recurrent),
        "rnn": ModuleWorkload(partial(shapes.Recurrent, nn.RNN, dim // 6, 2), **recurrent),
        "vgg11_4_images": ModuleWorkload(_augmented_vgg, 4 * batch, (4, 3, 32, 32), (4,)),
    }


def _augmented_vgg() -> nn.Module:
    return shapes.Augmented(native.vgg(11))


SHAPES = shapes_of(dim=768, layers=4, vocabulary=20_000, length=64, image=224, batch=8)

SCALES: dict[str, dict[str, Workload | ModuleWorkload]] = {
    "smoke": {"tiny": small_cnn(4)},
    "cpu": TABLE | SHAPES,
    # On a GPU: the same rows, and those of 32x32 at the batch size of the literature.
    "full": TABLE | SHAPES | {name: large for name, large in _LARGE.items() if name != "small_cnn_b256"},
}
