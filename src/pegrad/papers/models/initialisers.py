"""The laws that parameters start from: `(key, weight_shape) -> {"weight", "bias"}`.

A weight's first axis is its outputs; fan_in is the size of the others, fan_out that of all but the second.
Parameters are float32, on torch's default device.
"""

import math
from collections.abc import Callable

import torch

from pegrad import random
from pegrad.papers.models.base import Params

Initialiser = Callable[[torch.Tensor, tuple[int, ...]], Params]


def uniform_fan_in(key: torch.Tensor, shape: tuple[int, ...]) -> Params:
    """Draw weight and bias uniformly within ±1/√fan_in, the law of PyTorch's own layers."""
    bound = 1 / math.sqrt(_fan_in(shape))
    weight_key, bias_key = random.split(key, 2)

    def draw(key: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return random.uniform(key, shape, dtype=torch.float32).mul_(2 * bound).sub_(bound)

    return {"weight": draw(weight_key, shape), "bias": draw(bias_key, shape[:1])}


def normal(std: float) -> Initialiser:
    """Draw the weight from N(0, std²); the bias is 0."""

    def initialiser(key: torch.Tensor, shape: tuple[int, ...]) -> Params:
        weight = random.normal(key, shape, dtype=torch.float32).mul_(std)
        return {"weight": weight, "bias": torch.zeros(shape[0], dtype=torch.float32)}

    return initialiser


def normal_fan_in(key: torch.Tensor, shape: tuple[int, ...]) -> Params:
    """Draw the weight from N(0, 1/fan_in), which keeps the variance of a normalised input; the bias is 0."""
    return normal(1 / math.sqrt(_fan_in(shape)))(key, shape)


def kaiming_fan_in(key: torch.Tensor, shape: tuple[int, ...]) -> Params:
    """Draw the weight from N(0, 2/fan_in), which keeps the variance of activations through ReLUs; the bias is 0.

    Source: He et al. 2015, "Delving deep into rectifiers", Section 2.2.
    """
    return normal(math.sqrt(2 / _fan_in(shape)))(key, shape)


def kaiming_fan_out(key: torch.Tensor, shape: tuple[int, ...]) -> Params:
    """Draw the weight from N(0, 2/fan_out), which keeps the variance of gradients through ReLUs; the bias is 0.

    Source: He et al. 2015, "Delving deep into rectifiers", Section 2.2.
    """
    return normal(math.sqrt(2 / _fan_out(shape)))(key, shape)


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _fan_out(shape: tuple[int, ...]) -> int:
    return shape[0] * math.prod(shape[2:])
