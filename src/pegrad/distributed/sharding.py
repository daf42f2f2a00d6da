"""Parameters and optimizer state in shards: each rank keeps some rows of every tensor, and makes their noise itself."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pegrad import random, trees
from pegrad.distributed.groups import Group, Mesh, group_of
from pegrad.errors import ArgumentError, LeafError
from pegrad.optim.base import GradientTransformation
from pegrad.trees import PyTree


def shard(tree: PyTree, mesh: Mesh = None) -> PyTree:
    """Split every tensor of a pytree by its rows over the ranks; those without an axis stay whole on each.

    Args:
        tree: pytree of tensors, the same on every rank, such as parameters.
        mesh: a one-dimensional `DeviceMesh`, a process group, or None for all ranks.

    Returns:
        The same pytree; a tensor with an axis becomes a `DTensor` that is `Shard(0)`.

    Raises:
        ArgumentError: no group of several processes, or a mesh of more than one dimension.
        LeafError: a leaf is no plain tensor.
    """
    group = group_of(mesh)
    if group.process_group is None:
        raise ArgumentError("Expected a process group to shard over: call torch.distributed.init_process_group first")
    leaves, spec = trees.flatten(tree)
    for path, leaf in zip(trees.paths(tree), leaves, strict=True):
        if not isinstance(leaf, Tensor) or isinstance(leaf, DTensor):
            raise LeafError(f"Expected a whole tensor at leaf {path}, got {type(leaf).__name__}")
    device_mesh = mesh if isinstance(mesh, DeviceMesh) else _mesh_of(group, leaves)
    return trees.unflatten(
        spec,
        [
            distribute_tensor(leaf.detach(), device_mesh, [Shard(0)], src_data_rank=None) if leaf.dim() else leaf
            for leaf in leaves
        ],
    )


def gather(tree: PyTree) -> PyTree:
    """Make every tensor of a pytree whole, on every rank; all ranks must call it."""
    return trees.map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


class Rows(NamedTuple):
    """The rows of a tensor that one rank has, of `DTensor`'s `Shard(0)`: equally many on each, but for the last."""

    shape: torch.Size
    """Of the whole."""
    start: int
    stop: int

    @classmethod
    def of(cls, shape: torch.Size, group: Group) -> "Rows":
        """Return those of this rank."""
        each = -(-shape[0] // group.size)
        start = min(group.rank * each, shape[0])
        return cls(shape, start, min(start + each, shape[0]))

    @property
    def flat(self) -> random.Part:
        """Where they lie among all numbers of the tensor."""
        row = self.shape[1:].numel()
        return random.Part(self.shape.numel(), self.start * row, self.stop * row)

    def scatter_sum(self, group: Group, whole: Tensor) -> Tensor:
        """Add up a tensor over the ranks, and return these rows of it."""
        each = -(-self.shape[0] // group.size)
        return group.scatter_sum(_padded(whole, each * group.size))[: self.stop - self.start]

    def gather(self, group: Group, part: Tensor) -> Tensor:
        """Put these rows together with the other ranks'."""
        each = -(-self.shape[0] // group.size)
        return torch.cat(group.all(_padded(part, each)))[: self.shape[0]]


def _padded(rows: Tensor, count: int) -> Tensor:
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def rows_of(leaf: Tensor, group: Group) -> Rows | None:
    """Return which rows of a sharded leaf this rank has; None for a whole one.

    Raises:
        LeafError: it is split in another way than by rows over this group.
    """
    if not isinstance(leaf, DTensor):
        return None
    if leaf.placements != (Shard(0),) or leaf.device_mesh.size() != group.size:
        raise LeafError(
            f"A leaf of params is a DTensor with placements {leaf.placements} on {leaf.device_mesh.size()} ranks: "
            f"expected (Shard(dim=0),) on the {group.size} ranks of the step, as pegrad.distributed.shard makes it"
        )
    return Rows.of(leaf.shape, group)


def local(tree: PyTree) -> PyTree:
    """Take this rank's part of every tensor: a plain one, that shares its memory."""
    return trees.map(lambda leaf: leaf.to_local() if isinstance(leaf, DTensor) else leaf, tree)


def laid_out(parts: PyTree, like: PyTree) -> PyTree:
    """Put this rank's parts together with the others', leaf by leaf in the way of another pytree's."""

    def placed(part: Tensor, model: Tensor) -> Tensor:
        if not isinstance(model, DTensor):
            return part
        return DTensor.from_local(
            part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
        )

    return trees.map(placed, parts, like)


def check_elementwise(optimizer: GradientTransformation, params: PyTree) -> None:
    """Check, on small numbers, that an optimizer does to parts of tensors what it does to the whole.

    Raises:
        ArgumentError: it does not: it looks at norms, means, rows or other numbers than the one that it updates.
    """
    leaves, spec = trees.flatten(params)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[Tensor]:
        return [
            torch.randn(_ROWS, *[2] * (leaf.dim() - 1), generator=generator).to(leaf.dtype)
            if isinstance(leaf, DTensor)
            else torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
            for leaf in leaves
        ]

    trial, steps = drawn(), [drawn() for _ in range(3)]

    def updates(rows: slice) -> list[Tensor]:
        def taken(some: list[Tensor]) -> PyTree:
            pairs = zip(some, leaves, strict=True)
            return trees.unflatten(spec, [t[rows] if isinstance(leaf, DTensor) else t for t, leaf in pairs])

        state = optimizer.init(taken(trial))
        for grads in steps:
            found, state = optimizer.update(taken(grads), state, taken(trial))
        return trees.leaves(found)

    whole, first, second = (updates(rows) for rows in (slice(None), slice(1), slice(1, None)))
    for leaf, all_rows, *some in zip(leaves, whole, first, second, strict=True):
        expected = torch.cat(some) if isinstance(leaf, DTensor) else some[0]
        if not torch.equal(all_rows, expected):
            raise ArgumentError(
                "The optimizer treats a part of a tensor otherwise than the whole, so it cannot run on shards: use an "
                "elementwise one, such as pegrad.optim.sgd or adam, or whole parameters"
            )


_ROWS = 4


def _mesh_of(group: Group, leaves: list[Tensor]) -> DeviceMesh:
    kind = leaves[0].device.type if leaves else "cpu"
    if group.size == torch.distributed.get_world_size():
        return init_device_mesh(kind, (group.size,))
    assert group.process_group is not None
    return DeviceMesh.from_group(group.process_group, kind)
