"""What a sampler draws: rows of the data set and a mask, both of a fixed shape."""

from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.errors import ArgumentError


class Draw(NamedTuple):
    """The rows that make up one batch.

    Which examples were drawn, and how many, is what amplification by sampling keeps secret: the accounted epsilon
    does not cover publishing any of these fields.
    """

    indices: Tensor
    """`int64` (M,), rows of the data set; 0 where the row is padding."""
    mask: Tensor
    """`bool` (M,), True where the row is an example."""
    truncated: int = 0
    """How many drawn examples were left out because the batch was full."""


class UserDraw(NamedTuple):
    """The users that make up one batch, and the records of each. As secret as a `Draw`."""

    indices: Tensor
    """`int64` (M, k), rows of the data set; 0 where the row is padding."""
    mask: Tensor
    """`bool` (M,), True where the row is a user: the mask that a step takes."""
    records: Tensor
    """`bool` (M, k), True where the record is one: the mask that the loss of a user takes."""
    truncated: int = 0
    """How many drawn users were left out because the batch was full."""


def gather(dataset: trees.PyTree, draw: Draw | UserDraw) -> trees.PyTree:
    """Take the drawn rows of a data set.

    Args:
        dataset: a pytree of tensors with one leading axis, the examples.
        draw: which rows; padding repeats row 0, and only the draw's masks tell.

    Returns:
        The batch: the same pytree with leading axis M, or leading axes M and k for a `UserDraw`, on the data set's
        device.

    Raises:
        LeafError: a leaf is not a tensor, or the leaves disagree on the leading axis.
        ArgumentError: the data set has fewer rows than the sampler was told.
    """
    leaves, spec, rows = trees.flatten_batch(dataset)
    if draw.indices.max() >= rows:
        raise ArgumentError(
            f"The data set has {rows} rows, but the draw comes from more: give the sampler num_examples={rows}."
        )
    return trees.unflatten(spec, [leaf[draw.indices.to(leaf.device)] for leaf in leaves])


def padded(examples: Tensor, rows: int, truncated: int = 0) -> Draw:
    """Make a draw of the rows of its examples, at most as many as it shall have rows."""
    indices = torch.zeros(rows, dtype=torch.int64, device="cpu")
    indices[: len(examples)] = examples
    return Draw(indices, torch.arange(rows, device="cpu") < len(examples), truncated)
