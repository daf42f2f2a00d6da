"""Wide residual networks in the form that private training uses."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F

from pegrad.errors import ArgumentError
from pegrad.papers.models.base import Layer, Model, add, identity, on_images, sequential
from pegrad.papers.models.initialisers import normal_fan_in
from pegrad.papers.models.layers import conv, group_norm, linear, mean_pool, standardised_conv

Convolution = Callable[..., Model]
Norm = Callable[[int], Model]


def wrn(
    depth: int = 16,
    width: int = 4,
    *,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    groups: int = 16,
    weight_standardisation: bool = False,
) -> Model:
    """A wide residual network with group normalisation after each ReLU.

    Args:
        depth: 6n + 4 for n blocks in each of the three stages: 10, 16, 22, 28, 40, ...
        width: by what factor the stages are wider than 16, 32 and 64 channels.
        image_size: height and width of an image.
        in_channels: channels of an image.
        num_classes: how many classes.
        groups: groups of every normalisation, a divisor of 16.
        weight_standardisation: use `standardised_conv` for every convolution rather than a plain one.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: the depth is not 6n + 4, a size is below 1, or the groups do not divide 16.

    Source:
        Zagoruyko and Komodakis 2016, as modified by De et al. 2022, "Unlocking high-accuracy differentially
        private image classification through scale", Section 3.
    """
    if depth < 10 or depth % 6 != 4:
        raise ArgumentError(f"Expected depth to be 6n + 4 with n at least 1, such as 16 or 40, got depth={depth}.")
    convolution = standardised_conv if weight_standardisation else partial(conv, initialiser=normal_fan_in)
    norm = partial(group_norm, groups)
    stages: dict[str, Layer] = {}
    channels = 16
    for stage in range(3):
        out_channels = 16 * 2**stage * width
        for index in range((depth - 4) // 6):
            stride = 2 if stage > 0 and index == 0 else 1
            stages[f"block{stage + 1}_{index + 1}"] = add(
                skip=_unit(channels, out_channels, 1, stride, convolution, norm) if index == 0 else identity,
                branch=sequential(
                    unit1=_unit(channels, out_channels, 3, stride, convolution, norm),
                    unit2=_unit(out_channels, out_channels, 3, 1, convolution, norm),
                ),
            )
            channels = out_channels
    network = sequential(
        conv=convolution(in_channels, 16, 3, padding=1),
        **stages,
        relu=F.relu,
        norm=norm(channels),
        mean=mean_pool,
        linear=linear(channels, num_classes, initialiser=normal_fan_in),
    )
    return on_images(network, in_channels, image_size)


def _unit(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, convolution: Convolution, norm: Norm
) -> Model:
    """ReLU, normalisation, convolution: in this order, every convolution is given a normalised input."""
    return sequential(
        relu=F.relu,
        norm=norm(in_channels),
        conv=convolution(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2),
    )
