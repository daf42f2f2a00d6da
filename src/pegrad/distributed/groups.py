"""The ranks that work together: a process group of `torch.distributed`, or a single process without one."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pegrad.errors import ArgumentError

Mesh = DeviceMesh | dist.ProcessGroup | None
"""A one-dimensional mesh or a process group; None: all ranks, or the one process that there is."""


@dataclass(frozen=True)
class Group:
    """A process group, this process's rank in it and its size; without one, rank 0 of 1, where nothing is sent."""

    process_group: dist.ProcessGroup | None
    rank: int
    size: int

    @property
    def device(self) -> torch.device:
        """Where small messages lie: on the accelerator, if the group's backend sends from there."""
        if self.size > 1 and dist.get_backend(self.process_group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place: every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Add up a tensor over the ranks, of which each gets as many rows as every other, in the order of ranks."""
        if self.size == 1:
            return rows
        part = rows.new_empty(len(rows) // self.size, *rows.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13
        scatter(part, rows, group=self.process_group)
        return part

    def home(self, rank: int) -> int:
        """Return a rank's number among all processes."""
        return rank if self.process_group is None else dist.get_global_rank(self.process_group, rank)

    def all(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor; all have one shape."""
        if self.size == 1:
            return [tensor]
        found = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self.process_group)
        return found

    def wait(self) -> None:
        """Wait for every rank to come here."""
        if self.size > 1:
            dist.barrier(group=self.process_group)


def group_of(mesh: Mesh) -> Group:
    """Make a group of a mesh.

    Raises:
        ArgumentError: it has more than one dimension, is nothing of that kind, or this process is not in it.
    """
    if mesh is None:
        if not (dist.is_available() and dist.is_initialized()):
            return Group(None, 0, 1)
        return Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ArgumentError(f"Expected a mesh of one dimension, got {mesh.ndim}: take one, as in mesh['data']")
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise ArgumentError(
            f"Expected mesh to be a DeviceMesh, a process group this process is in, or None, got {type(mesh).__name__}"
        )
    rank = dist.get_rank(mesh)
    if rank < 0:
        raise ArgumentError("Expected a process group this process is in, got one of other processes")
    return Group(mesh, rank, dist.get_world_size(mesh))
