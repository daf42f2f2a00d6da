"""The vision transformer."""

from functools import partial

import torch
import torch.nn.functional as F

from pegrad import random
from pegrad.errors import ArgumentError
from pegrad.papers.models.base import Layer, Model, Params, add, identity, on_images, sequential
from pegrad.papers.models.layers import conv, layer_norm, linear


def vit(
    *,
    image_size: int = 32,
    patch_size: int = 4,
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    mlp_ratio: int = 4,
    in_channels: int = 3,
    num_classes: int = 10,
) -> Model:
    """A vision transformer with a class token, learned positions and normalisation before each branch.

    Args:
        image_size: height and width of an image, a multiple of `patch_size`.
        patch_size: height and width of a patch.
        dim: features d of a token, a multiple of `heads`.
        depth: how many blocks.
        heads: attention heads of a block.
        mlp_ratio: by what factor the hidden layer of a block is wider than `dim`.
        in_channels: channels of an image.
        num_classes: how many classes.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,).

    Raises:
        ArgumentError: a size is below 1 or does not divide the one that it must.

    Source:
        Dosovitskiy et al. 2021, Section 3.1; without dropout.
    """
    _check_divides("patch_size", patch_size, "image_size", image_size)
    _check_divides("heads", heads, "dim", dim)
    patches = (image_size // patch_size) ** 2
    blocks: dict[str, Layer] = {f"block{index + 1}": _block(dim, heads, mlp_ratio) for index in range(depth)}
    network = sequential(
        patches=conv(in_channels, dim, patch_size, stride=patch_size),
        to_tokens=_to_tokens,
        embedding=_embedding(patches, dim),
        **blocks,
        norm=layer_norm(dim),
        take_class_token=_take_class_token,
        linear=linear(dim, num_classes),
    )
    return on_images(network, in_channels, image_size)


def _embedding(patches: int, dim: int) -> Model:
    """Put the class token before T patches (T, d), and add to each its position's embedding."""

    def init(key: torch.Tensor) -> Params:
        class_key, positions_key = random.split(key, 2)
        return {
            "class": random.normal(class_key, (1, dim), dtype=torch.float32).mul_(0.02),
            "positions": random.normal(positions_key, (patches + 1, dim), dtype=torch.float32).mul_(0.02),
        }

    def apply(params: Params, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([params["class"], tokens]) + params["positions"]

    return Model(init, apply)


def _block(dim: int, heads: int, mlp_ratio: int) -> Model:
    attention = sequential(
        norm=layer_norm(dim),
        queries_keys_values=linear(dim, 3 * dim),
        attend=partial(_attend, heads=heads),
        output=linear(dim, dim),
    )
    mlp = sequential(
        norm=layer_norm(dim),
        hidden=linear(dim, mlp_ratio * dim),
        gelu=F.gelu,
        output=linear(mlp_ratio * dim, dim),
    )
    return sequential(attention=add(skip=identity, branch=attention), mlp=add(skip=identity, branch=mlp))


def _attend(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Attend over T tokens, from queries, keys and values side by side (T, 3d) to (T, d)."""
    queries, keys, values = x.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(0, 1).flatten(1)


def _to_tokens(x: torch.Tensor) -> torch.Tensor:
    """Turn a grid (d, H, W) into a sequence (H·W, d)."""
    return x.flatten(1).transpose(0, 1)


def _take_class_token(x: torch.Tensor) -> torch.Tensor:
    return x[0]


def _check_divides(name: str, size: int, whole_name: str, whole: int) -> None:
    if size < 1 or whole < 1 or whole % size:
        raise ArgumentError(f"Expected {name} to divide {whole_name}, got {name}={size} and {whole_name}={whole}.")
