"""VGG networks without batch normalisation, for small images and for ImageNet's."""

from functools import partial

import torch
import torch.nn.functional as F

from pegrad.errors import ArgumentError
from pegrad.papers.models.base import Layer, Model, on_images, sequential
from pegrad.papers.models.initialisers import kaiming_fan_out, normal
from pegrad.papers.models.layers import conv, linear, max_pool, output_size

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, *, image_size: int = 32, in_channels: int = 3, num_classes: int = 10) -> Model:
    """VGG for small images: the convolutions of the paper, then a single linear layer.

    Args:
        depth: 11, 13, 16 or 19.
        image_size: height and width of an image, at least 32.
        in_channels: channels of an image.
        num_classes: how many classes.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: the depth is none of the four, a size is below 1, or the image is too small.

    Source:
        Simonyan and Zisserman 2015, Table 1, columns A, B, D and E; one linear layer, as is usual on CIFAR-10.
    """
    size = output_size(image_size, *[(2, 2, 0)] * len(_WIDTHS))
    network = sequential(
        features=_features(depth, in_channels),
        flatten=torch.flatten,
        classifier=linear(_WIDTHS[-1] * size**2, num_classes, initialiser=normal(0.01)),
    )
    return on_images(network, in_channels, image_size)


def vgg_imagenet(
    depth: int,
    *,
    image_size: int = 224,
    in_channels: int = 3,
    num_classes: int = 1000,
    hidden_features: int = 4096,
) -> Model:
    """VGG with the three linear layers of the paper; the layers of torchvision's, less the dropout.

    Args:
        depth: 11, 13, 16 or 19.
        image_size: height and width of an image, at least 32; features are averaged or repeated to 7×7.
        in_channels: channels of an image.
        num_classes: how many classes.
        hidden_features: outputs of each of the two hidden linear layers.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: the depth is none of the four, a size is below 1, or the image is too small.

    Source:
        Simonyan and Zisserman 2015, Table 1, columns A, B, D and E.
    """
    output_size(image_size, *[(2, 2, 0)] * len(_WIDTHS))
    initialiser = normal(0.01)
    classifier = sequential(
        linear1=linear(_WIDTHS[-1] * 7 * 7, hidden_features, initialiser=initialiser),
        relu1=F.relu,
        linear2=linear(hidden_features, hidden_features, initialiser=initialiser),
        relu2=F.relu,
        linear3=linear(hidden_features, num_classes, initialiser=initialiser),
    )
    network = sequential(
        features=_features(depth, in_channels),
        resize=partial(F.adaptive_avg_pool2d, output_size=(7, 7)),
        flatten=torch.flatten,
        classifier=classifier,
    )
    return on_images(network, in_channels, image_size)


def _features(depth: int, in_channels: int) -> Model:
    """Five stages of 3×3 convolutions and ReLUs, each ended by a max-pool that halves the image."""
    if depth not in _CONVOLUTIONS:
        raise ArgumentError(f"Expected depth to be one of {sorted(_CONVOLUTIONS)}, got depth={depth}.")
    layers: dict[str, Layer] = {}
    for stage, (count, width) in enumerate(zip(_CONVOLUTIONS[depth], _WIDTHS, strict=True), start=1):
        for index in range(1, count + 1):
            layers[f"conv{stage}_{index}"] = conv(in_channels, width, 3, padding=1, initialiser=kaiming_fan_out)
            layers[f"relu{stage}_{index}"] = F.relu
            in_channels = width
        layers[f"pool{stage}"] = max_pool(2)
    return sequential(**layers)
