"""Residual networks with group normalisation in place of batch normalisation, which couples examples."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F

from pegrad.errors import ArgumentError
from pegrad.papers.models.base import Layer, Model, add, identity, on_images, sequential
from pegrad.papers.models.initialisers import kaiming_fan_out
from pegrad.papers.models.layers import conv, group_norm, linear, max_pool, mean_pool, standardised_conv

Convolution = Callable[..., Model]
Norm = Callable[[int], Model]


def resnet(
    depth: int,
    *,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    groups: int = 32,
    weight_standardisation: bool = False,
) -> Model:
    """A residual network for small images: it begins with one 3×3 convolution at full resolution.

    Args:
        depth: 18, 34 or 50.
        image_size: height and width of an image.
        in_channels: channels of an image.
        num_classes: how many classes.
        groups: groups of every normalisation, a divisor of 64.
        weight_standardisation: use `standardised_conv` for every convolution; otherwise convolutions have no bias.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: the depth is none of the three, a size is below 1, or the groups do not divide 64.

    Source:
        He et al. 2016, with the groups of Wu and He 2018.
    """
    convolution, norm = _convolution(weight_standardisation), partial(group_norm, groups)
    stem = sequential(conv=convolution(in_channels, 64, 3, padding=1), norm=norm(64), relu=F.relu)
    return on_images(_network(depth, stem, convolution, norm, num_classes), in_channels, image_size)


def resnet_imagenet(
    depth: int,
    *,
    image_size: int = 224,
    in_channels: int = 3,
    num_classes: int = 1000,
    groups: int = 32,
    weight_standardisation: bool = False,
) -> Model:
    """A residual network for large images: a 7×7 convolution and a max-pool first divide their size by four.

    Args:
        depth: 18, 34 or 50.
        image_size: height and width of an image.
        in_channels: channels of an image.
        num_classes: how many classes.
        groups: groups of every normalisation, a divisor of 64.
        weight_standardisation: use `standardised_conv` for every convolution; otherwise convolutions have no bias.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: the depth is none of the three, a size is below 1, or the groups do not divide 64.

    Source:
        He et al. 2016, with the groups of Wu and He 2018; strides where torchvision has them.
    """
    convolution, norm = _convolution(weight_standardisation), partial(group_norm, groups)
    stem = sequential(
        conv=convolution(in_channels, 64, 7, stride=2, padding=3),
        norm=norm(64),
        relu=F.relu,
        pool=max_pool(3, stride=2, padding=1),
    )
    return on_images(_network(depth, stem, convolution, norm, num_classes), in_channels, image_size)


def _convolution(weight_standardisation: bool) -> Convolution:
    if weight_standardisation:
        return standardised_conv
    return partial(conv, bias=False, initialiser=kaiming_fan_out)


def _network(depth: int, stem: Model, convolution: Convolution, norm: Norm, num_classes: int) -> Model:
    """The stem, four stages of blocks, each but the first halving the image, then mean and linear layer."""
    if depth not in _BLOCKS:
        raise ArgumentError(f"Expected depth to be one of {sorted(_BLOCKS)}, got depth={depth}.")
    branch, expansion, counts = _BLOCKS[depth]
    stages: dict[str, Layer] = {}
    in_channels = 64
    for stage, count in enumerate(counts):
        width = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            stages[f"block{stage + 1}_{index + 1}"] = sequential(
                sum=add(
                    skip=_skip(in_channels, width * expansion, stride, convolution, norm),
                    branch=branch(in_channels, width, stride, convolution, norm),
                ),
                relu=F.relu,
            )
            in_channels = width * expansion
    return sequential(stem=stem, **stages, mean=mean_pool, linear=linear(in_channels, num_classes))


def _skip(in_channels: int, out_channels: int, stride: int, convolution: Convolution, norm: Norm) -> Layer:
    if stride == 1 and in_channels == out_channels:
        return identity
    return sequential(conv=convolution(in_channels, out_channels, 1, stride=stride), norm=norm(out_channels))


def _basic(in_channels: int, width: int, stride: int, convolution: Convolution, norm: Norm) -> Model:
    """Two 3×3 convolutions."""
    return sequential(
        conv1=convolution(in_channels, width, 3, stride=stride, padding=1),
        norm1=norm(width),
        relu=F.relu,
        conv2=convolution(width, width, 3, padding=1),
        norm2=norm(width),
    )


def _bottleneck(in_channels: int, width: int, stride: int, convolution: Convolution, norm: Norm) -> Model:
    """A 3×3 convolution between two of 1×1, the last of which multiplies the channels by four."""
    return sequential(
        conv1=convolution(in_channels, width, 1),
        norm1=norm(width),
        relu1=F.relu,
        conv2=convolution(width, width, 3, stride=stride, padding=1),
        norm2=norm(width),
        relu2=F.relu,
        conv3=convolution(width, 4 * width, 1),
        norm3=norm(4 * width),
    )


# For each depth: what a block's branch is, by how much it multiplies its width, how many blocks a stage has.
_BLOCKS: dict[int, tuple[Callable[..., Model], int, tuple[int, ...]]] = {
    18: (_basic, 1, (2, 2, 2, 2)),
    34: (_basic, 1, (3, 4, 6, 3)),
    50: (_bottleneck, 4, (3, 4, 6, 3)),
}
