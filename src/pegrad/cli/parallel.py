"""A training run under `torchrun`: its processes share every batch, and the first one tells of it.

`pegrad.distributed` is imported where there are such processes: it takes its time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pegrad.dp_sgd import DPSGD, State, Step
from pegrad.errors import ArgumentError
from pegrad.papers.data import Dataset
from pegrad.papers.training import Plan
from pegrad.random.keys import key_bytes
from pegrad.sampling import Draw
from pegrad.trees import PyTree

if TYPE_CHECKING:
    from pegrad.distributed.groups import Group


@contextmanager
def ranks(device: torch.device) -> "Iterator[Group | None]":
    """Join the processes that `torchrun` has started, for as long as the block runs; None where it has not."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield None
        return
    from pegrad.distributed.groups import group_of

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield group_of(None)
    finally:
        dist.destroy_process_group()


def common_key(group: "Group", key: Tensor) -> Tensor:
    """Return the first rank's key on every rank."""
    told = torch.tensor(list(key_bytes(key)), dtype=torch.uint8, device=group.device)
    return group.all(told)[0].cpu()


@dataclass(frozen=True)
class SharedPlan(Plan):
    """A plan whose batches are split over the ranks."""

    def taken(self, dataset: Dataset, params: PyTree, state: State, draw: Draw) -> Step:
        """See `Plan.taken`."""
        from pegrad.distributed import ExactSum, data_parallel, load, split

        assert isinstance(self.step, DPSGD)
        (share,) = split(draw)
        batch = load((dataset.train_images, dataset.train_labels), share)
        return data_parallel(self.step, summation=ExactSum)(params, state, batch, share)


def shared(plan: Plan) -> Plan:
    """Return the plan as several ranks carry it out.

    Raises:
        ArgumentError: the plan is not private.
    """
    if not isinstance(plan.step, DPSGD):
        raise ArgumentError("Expected a private run on several processes, got --no-dp: run that on one")
    return SharedPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})
