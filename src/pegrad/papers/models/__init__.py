"""The networks of the papers as pairs of pure functions over nested dicts of tensors.

>>> import torch
>>> from pegrad import random
>>> model = mnist_cnn()
>>> params = model.init(random.key(0))
>>> model.apply(params, torch.zeros(1, 28, 28)).shape
torch.Size([10])
"""

from collections.abc import Callable
from functools import partial

from pegrad.papers.models.alexnet import alexnet
from pegrad.papers.models.base import Model, add, sequential
from pegrad.papers.models.cnn import mnist_cnn, small_cnn, tanh_cnn, toy_cnn
from pegrad.papers.models.resnet import resnet, resnet_imagenet
from pegrad.papers.models.vgg import vgg, vgg_imagenet
from pegrad.papers.models.vit import vit
from pegrad.papers.models.wrn import wrn

__all__ = [
    "MODELS",
    "Model",
    "add",
    "alexnet",
    "mnist_cnn",
    "resnet",
    "resnet_imagenet",
    "sequential",
    "small_cnn",
    "tanh_cnn",
    "toy_cnn",
    "vgg",
    "vgg_imagenet",
    "vit",
    "wrn",
]

# For the command line. Every entry takes `image_size`, `in_channels` and `num_classes`, and has defaults for all.
MODELS: dict[str, Callable[..., Model]] = {
    "toy_cnn": toy_cnn,
    "mnist_cnn": mnist_cnn,
    "tanh_cnn": tanh_cnn,
    "small_cnn": small_cnn,
    "alexnet": alexnet,
    **{f"vgg{depth}": partial(vgg, depth) for depth in (11, 13, 16, 19)},
    **{f"vgg{depth}_imagenet": partial(vgg_imagenet, depth) for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": partial(resnet, depth) for depth in (18, 34, 50)},
    **{f"resnet{depth}_imagenet": partial(resnet_imagenet, depth) for depth in (18, 34, 50)},
    "wrn16_4": partial(wrn, 16, 4),
    "wrn40_4": partial(wrn, 40, 4),
    "vit": vit,
}
