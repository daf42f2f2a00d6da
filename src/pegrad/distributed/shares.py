"""A draw cut into micro-batches for the ranks of a group: which rows of the batch are whose."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pegrad import trees
from pegrad._validate import check_size
from pegrad.distributed.groups import Mesh, group_of
from pegrad.errors import ArgumentError
from pegrad.sampling import Draw, gather


class Share(NamedTuple):
    """One micro-batch of a group's draw: the rows of one rank, told in a way that the other ranks can check."""

    indices: Tensor
    """`int64` (m,), rows of the data set; 0 where the row is padding. As secret as a `Draw`."""
    mask: Tensor
    """`bool` (m,), True where the row is an example."""
    number: int
    """Which micro-batch of the draw it is."""
    total: int
    """How many micro-batches the draw was cut into."""
    draw: bytes
    """What the whole draw and its cut look like: the same on every rank, or the step is refused."""


def split(draw: Draw, mesh: Mesh = None, *, microbatch_size: int | None = None) -> list[Share]:
    """Cut the draw of a group into micro-batches of one size, and take those of this rank.

    Every rank calls it with the same draw, made from a key that all have. The examples of a draw lie before its
    padding, so micro-batches at the end may be padding alone: every rank has equally many, each of the same shape.

    Args:
        draw: of the whole group's batch, the same on every rank.
        mesh: the ranks: a one-dimensional `DeviceMesh`, a process group, or None for all.
        microbatch_size: rows of a micro-batch. Where it is given the cut does not depend on how many ranks there are,
            but for micro-batches of padding at the end. None: one micro-batch for each rank.

    Returns:
        This rank's micro-batches, for `DataParallel`.

    Raises:
        ArgumentError: not a draw of examples, or a size below 1.
    """
    if not isinstance(draw, Draw):
        raise ArgumentError(f"Expected draw to be a Draw of pegrad.sampling, got {type(draw).__name__}")
    check_size("microbatch_size", microbatch_size)
    group = group_of(mesh)
    rows = len(draw.mask)
    size = microbatch_size or max(1, -(-rows // group.size))
    here = max(1, -(-rows // (size * group.size)))
    total = here * group.size
    padding = total * size - rows
    indices = torch.cat([draw.indices, draw.indices.new_zeros(padding)]).split(size)
    mask = torch.cat([draw.mask, draw.mask.new_zeros(padding)]).split(size)
    look = hashlib.blake2b(f"{rows} {size}".encode(), digest_size=16)
    for part in draw.indices, draw.mask:
        look.update(part.cpu().contiguous().numpy().tobytes())
    mine = range(group.rank * here, (group.rank + 1) * here)
    return [Share(indices[number], mask[number], number, total, look.digest()) for number in mine]


def load(
    dataset: trees.PyTree | Dataset[Any],
    share: Share,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
) -> trees.PyTree:
    """Load a share's rows, of which padding repeats row 0: this rank alone needs them.

    Args:
        dataset: a pytree of tensors with one leading axis, or a map-style `Dataset`.
        share: of `split`.
        collate_fn: makes a batch of a `Dataset`'s items.

    Returns:
        The batch, each leaf with leading axis `m`.

    Raises:
        LeafError, ArgumentError: as `pegrad.sampling.gather`.
    """
    if isinstance(dataset, Dataset):
        return collate_fn([dataset[row] for row in share.indices.tolist()])
    return gather(dataset, Draw(share.indices, share.mask))
