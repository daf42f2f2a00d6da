"""Small convolutional networks of the papers: each is a list of its layers, read from top to bottom."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pegrad.papers.models.base import Layer, Model, on_images, sequential
from pegrad.papers.models.initialisers import kaiming_fan_in
from pegrad.papers.models.layers import conv, linear, max_pool, output_size

Function = Callable[[torch.Tensor], torch.Tensor]


def toy_cnn(
    *,
    channels: int = 25,
    rate: float = 1.0,
    layers: int = 2,
    kernel_size: int = 5,
    image_size: int = 256,
    in_channels: int = 3,
    num_classes: int = 10,
) -> Model:
    """The network whose depth and width the runtime figures of Rochette et al. vary.

    Convolutions with padding 2, each followed by a ReLU and every second one by a 2×2 max-pool; then one linear
    layer.

    Args:
        channels: output channels of the first convolution.
        rate: by what factor the channels grow from one convolution to the next.
        layers: how many convolutions.
        kernel_size: height and width of their kernels.
        image_size: height and width of an image.
        in_channels: channels of an image.
        num_classes: how many classes.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: a size is below 1, or the image is too small.

    Source:
        Rochette, Manoel and Tramel 2019, Section 4, the network of Figures 1 to 3.
    """
    network: dict[str, Layer] = {}
    size, width = image_size, in_channels
    for index in range(layers):
        next_width = int(channels * rate**index)
        network[f"conv{index + 1}"] = conv(width, next_width, kernel_size, padding=2)
        network[f"relu{index + 1}"] = F.relu
        size, width = output_size(size, (kernel_size, 1, 2)), next_width
        if index % 2 == 1:
            network[f"pool{index + 1}"] = max_pool(2)
            size = output_size(size, (2, 2, 0))
    network["flatten"] = torch.flatten
    network["linear"] = linear(width * size**2, num_classes)
    return on_images(sequential(**network), in_channels, image_size)


def mnist_cnn(*, image_size: int = 28, in_channels: int = 1, num_classes: int = 10) -> Model:
    """The MNIST network of Rochette et al.: two 3×3 convolutions, a max-pool, two linear layers.

    At 28×28 it is the network of PyTorch's MNIST example without dropout and without the ReLU between the second
    convolution and the pool. Any image of at least 6×6 will do, such as scikit-learn's 8×8 digits.

    The hidden layers start from He's law, which the paper leaves open: gradients clipped to one norm then learn more
    in the first steps than from PyTorch's own, smaller law.

    Args:
        image_size: height and width of an image, at least 6.
        in_channels: channels of an image.
        num_classes: how many classes.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,); 1,199,882 parameters by default.

    Raises:
        ArgumentError: a size is below 1, or the image is too small.

    Source:
        Rochette, Manoel and Tramel 2019, the MNIST experiment.
    """
    size = output_size(image_size, (3, 1, 0), (3, 1, 0), (2, 2, 0))
    network = sequential(
        conv1=conv(in_channels, 32, 3, initialiser=kaiming_fan_in),
        relu1=F.relu,
        conv2=conv(32, 64, 3, initialiser=kaiming_fan_in),
        pool=max_pool(2),
        flatten=torch.flatten,
        linear1=linear(64 * size**2, 128, initialiser=kaiming_fan_in),
        relu2=F.relu,
        linear2=linear(128, num_classes),
    )
    return on_images(network, in_channels, image_size)


def tanh_cnn(
    *,
    image_size: int = 28,
    in_channels: int = 1,
    num_classes: int = 10,
    activation: Function = torch.tanh,
) -> Model:
    """The small MNIST network of the DP-SGD literature, whose bounded activations suit clipping.

    Args:
        image_size: height and width of an image, at least 14.
        in_channels: channels of an image.
        num_classes: how many classes.
        activation: an elementwise function.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,); 26,010 parameters by default.

    Raises:
        ArgumentError: a size is below 1, or the image is too small.

    Source:
        Papernot et al. 2021, "Tempered sigmoid activations for deep learning with differential privacy",
        Table 1.
    """
    size = output_size(image_size, (8, 2, 3), (2, 1, 0), (4, 2, 0), (2, 1, 0))
    network = sequential(
        conv1=conv(in_channels, 16, 8, stride=2, padding=3),
        activation1=activation,
        pool1=max_pool(2, stride=1),
        conv2=conv(16, 32, 4, stride=2),
        activation2=activation,
        pool2=max_pool(2, stride=1),
        flatten=torch.flatten,
        linear1=linear(32 * size**2, 32),
        activation3=activation,
        linear2=linear(32, num_classes),
    )
    return on_images(network, in_channels, image_size)


def small_cnn(
    *,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    activation: Function = torch.tanh,
) -> Model:
    """The small CIFAR-10 network of the DP-SGD literature: six 3×3 convolutions and two linear layers.

    A 2×2 max-pool follows every pair of convolutions.

    Args:
        image_size: height and width of an image, at least 8.
        in_channels: channels of an image.
        num_classes: how many classes.
        activation: an elementwise function.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,); 550,570 parameters by default.

    Raises:
        ArgumentError: a size is below 1, or the image is too small.

    Source:
        Papernot et al. 2021, Table 2, and Tramèr and Boneh 2021; the "CNN" of Bu, Mao and Xu 2022.
    """
    layers: dict[str, Layer] = {}
    width = in_channels
    for stage, next_width in enumerate((32, 64, 128), start=1):
        for index in (1, 2):
            layers[f"conv{stage}_{index}"] = conv(width, next_width, 3, padding=1)
            layers[f"activation{stage}_{index}"] = activation
            width = next_width
        layers[f"pool{stage}"] = max_pool(2)
    size = output_size(image_size, *[(2, 2, 0)] * 3)
    network = sequential(
        **layers,
        flatten=torch.flatten,
        linear1=linear(width * size**2, 128),
        activation=activation,
        linear2=linear(128, num_classes),
    )
    return on_images(network, in_channels, image_size)
