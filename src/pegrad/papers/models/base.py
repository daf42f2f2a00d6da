"""A model is a pair of pure functions; small models make larger ones, in sequence or as a sum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pegrad import random
from pegrad.errors import ArgumentError

Params = dict[str, Any]


class Model(NamedTuple):
    """A network, or any part of one, as a pair of pure functions over nested dicts of tensors.

    Attributes:
        init: `key -> params`: fresh float32 parameters, the same for the same key, on torch's default device.
        apply: `(params, x) -> y` for ONE example, without a batch axis. For a batch, vmap it:
            `torch.func.vmap(model.apply, (None, 0))(params, batch)`.
    """

    init: Callable[[torch.Tensor], Params]
    apply: Callable[[Params, torch.Tensor], torch.Tensor]


Layer = Model | Callable[[torch.Tensor], torch.Tensor]


def sequential(**layers: Layer) -> Model:
    """Apply layers one after the other.

    Args:
        layers: models and plain functions of a tensor, in order; only the models have parameters.

    Returns:
        Their composition, whose parameters are a dict by layer name.

    >>> from pegrad import random
    >>> from pegrad.papers.models.layers import linear
    >>> model = sequential(hidden=linear(2, 3), tanh=torch.tanh, output=linear(3, 1))
    >>> params = model.init(random.key(0))
    >>> list(params), model.apply(params, torch.zeros(2)).shape
    (['hidden', 'output'], torch.Size([1]))
    """

    def apply(params: Params, x: torch.Tensor) -> torch.Tensor:
        for name, layer in layers.items():
            x = _apply_layer(name, layer, params, x)
        return x

    return Model(lambda key: _init_layers(layers, key), apply)


def add(**branches: Layer) -> Model:
    """Apply branches to one input and add what they return: a residual block is a skip plus a branch.

    Args:
        branches: models and plain functions of a tensor; only the models have parameters.

    Returns:
        Their sum, whose parameters are a dict by branch name.
    """

    def apply(params: Params, x: torch.Tensor) -> torch.Tensor:
        first, *rest = (_apply_layer(name, branch, params, x) for name, branch in branches.items())
        return sum(rest, start=first)

    return Model(lambda key: _init_layers(branches, key), apply)


def identity(x: torch.Tensor) -> torch.Tensor:
    """Return the input: the skip of a residual block."""
    return x


def on_images(network: Model, in_channels: int, image_size: int) -> Model:
    """Make a network check that it is given one square image of the size it was built for.

    Args:
        network: the model to guard.
        in_channels: the channels C of an image.
        image_size: its height and width, in pixels.

    Returns:
        The same model; its `apply` raises `ArgumentError` for an input of any other shape than (C, H, W), such as
        a batch, which convolutions would take without a word.
    """
    expected = (in_channels, image_size, image_size)

    def apply(params: Params, image: torch.Tensor) -> torch.Tensor:
        if image.shape != expected:
            raise ArgumentError(
                f"Expected one image of shape {expected}, got shape {tuple(image.shape)}. For a batch, use "
                "torch.func.vmap(model.apply, (None, 0)); for another size, pass in_channels and image_size to "
                "the function that builds the model."
            )
        return network.apply(params, image)

    return Model(network.init, apply)


def _init_layers(layers: dict[str, Layer], key: torch.Tensor) -> Params:
    models = {name: layer for name, layer in layers.items() if isinstance(layer, Model)}
    return {name: model.init(random.fold_in(key, index)) for index, (name, model) in enumerate(models.items())}


def _apply_layer(name: str, layer: Layer, params: Params, x: torch.Tensor) -> torch.Tensor:
    return layer.apply(params[name], x) if isinstance(layer, Model) else layer(x)
