"""Layers: the parts that the networks are made of, each a `Model` or a plain function of one example."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from pegrad.errors import ArgumentError
from pegrad.papers.models.base import Model, Params
from pegrad.papers.models.initialisers import Initialiser, normal_fan_in, uniform_fan_in


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: bool = True,
    initialiser: Initialiser = uniform_fan_in,
) -> Model:
    """A two-dimensional convolution, from (C, H, W) to (D, H', W').

    Args:
        in_channels: C, at least 1.
        out_channels: D, at least 1.
        kernel_size: the height and width of the kernel.
        stride: the step between two positions of the kernel.
        padding: the zeros added on each side.
        bias: whether to add a bias to every channel.
        initialiser: the law that the parameters start from; PyTorch's own by default.

    Returns:
        The layer, with parameters "weight" (D, C, K, K) and "bias" (D,).

    Raises:
        ArgumentError: a size is below 1, or the padding below 0.
    """
    shape = (out_channels, in_channels, kernel_size, kernel_size)
    _check_at_least(1, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride)
    _check_at_least(0, padding=padding)

    def init(key: torch.Tensor) -> Params:
        params = initialiser(key, shape)
        return params if bias else {"weight": params["weight"]}

    def apply(params: Params, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, params["weight"], params.get("bias"), stride, padding)

    return Model(init, apply)


def standardised_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    initialiser: Initialiser = normal_fan_in,
) -> Model:
    """A convolution whose weight is standardised, output channel by output channel, and scaled by a gain.

    Args:
        in_channels: C, at least 1.
        out_channels: D, at least 1.
        kernel_size: the height and width of the kernel.
        stride: the step between two positions of the kernel.
        padding: the zeros added on each side.
        initialiser: the law that weight and bias start from.

    Returns:
        The layer, with parameters "weight" (D, C, K, K), "gain" (D,), which starts at 1, and "bias" (D,).

    Raises:
        ArgumentError: a size is below 1, or the padding below 0.

    Source:
        Brock et al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized
        ResNets", Equation 1: scaled weight standardisation; used under DP by De et al. 2022.
    """
    plain = conv(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=padding,
        initialiser=initialiser,
    )

    def init(key: torch.Tensor) -> Params:
        return plain.init(key) | {"gain": torch.ones(out_channels, dtype=torch.float32)}

    def apply(params: Params, x: torch.Tensor) -> torch.Tensor:
        weight = standardise(params["weight"]) * params["gain"][:, None, None, None]
        return plain.apply({"weight": weight, "bias": params["bias"]}, x)

    return Model(init, apply)


def standardise(weight: torch.Tensor) -> torch.Tensor:
    """Give each output channel of a weight (D, C, K, K) mean 0 and variance 1 / (C·K·K)."""
    deviation = weight - weight.mean((1, 2, 3), keepdim=True)
    total = deviation.square().sum((1, 2, 3), keepdim=True)
    # The bound keeps the gradient finite where all the weights of a channel are equal.
    return deviation * total.clamp_min(1e-4).rsqrt()


def linear(in_features: int, out_features: int, *, initialiser: Initialiser = uniform_fan_in) -> Model:
    """A linear layer on the last axis.

    Args:
        in_features: the size of that axis, at least 1.
        out_features: what it becomes, at least 1.
        initialiser: the law that the parameters start from; PyTorch's own by default.

    Returns:
        The layer, with parameters "weight" (out, in) and "bias" (out,).

    Raises:
        ArgumentError: a size is below 1.
    """
    _check_at_least(1, in_features=in_features, out_features=out_features)

    return Model(
        init=lambda key: initialiser(key, (out_features, in_features)),
        apply=lambda params, x: F.linear(x, params["weight"], params["bias"]),
    )


def group_norm(groups: int, channels: int) -> Model:
    """Group normalisation of (C, H, W), the stand-in for batch normalisation, which couples examples.

    Args:
        groups: how many groups the channels form; a divisor of `channels`.
        channels: C.

    Returns:
        The layer, with parameters "weight" (C,) and "bias" (C,), which start at 1 and 0.

    Raises:
        ArgumentError: the groups do not divide the channels.

    Source:
        Wu and He 2018.
    """
    _check_at_least(1, groups=groups, channels=channels)
    if channels % groups:
        raise ArgumentError(f"Expected groups to divide the {channels} channels of a layer, got groups={groups}.")

    def apply(params: Params, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x[None], groups, params["weight"], params["bias"]).squeeze(0)

    return Model(lambda key: _scale_and_shift(channels), apply)


def layer_norm(features: int) -> Model:
    """Layer normalisation of the last axis.

    Args:
        features: the size of that axis.

    Returns:
        The layer, with parameters "weight" and "bias" of that size, which start at 1 and 0.

    Source:
        Ba et al. 2016.
    """

    def apply(params: Params, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (features,), params["weight"], params["bias"])

    return Model(lambda key: _scale_and_shift(features), apply)


def max_pool(size: int, stride: int | None = None, padding: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that takes the maximum over windows; the stride is the size unless given."""
    return partial(F.max_pool2d, kernel_size=size, stride=stride, padding=padding)


def mean_pool(x: torch.Tensor) -> torch.Tensor:
    """Average (C, H, W) over its positions, to (C,)."""
    return x.mean((1, 2))


def output_size(size: int, *windows: tuple[int, int, int]) -> int:
    """Return the height of an image after convolutions and pools.

    Args:
        size: its height in pixels.
        windows: the (kernel_size, stride, padding) of each layer, in order.

    Returns:
        The height after the last layer.

    Raises:
        ArgumentError: the image is smaller than a window.

    >>> output_size(28, (3, 1, 0), (3, 1, 0), (2, 2, 0))
    12
    """
    height = size
    for kernel_size, stride, padding in windows:
        height = (height + 2 * padding - kernel_size) // stride + 1
        if height < 1:
            raise ArgumentError(
                f"Expected an image_size that leaves a pixel after every layer of this network, got {size}."
            )
    return height


def _scale_and_shift(features: int) -> Params:
    return {"weight": torch.ones(features, dtype=torch.float32), "bias": torch.zeros(features, dtype=torch.float32)}


def _check_at_least(bound: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < bound:
            raise ArgumentError(f"Expected {name} to be at least {bound}, got {name}={size}.")
