"""A run's parameters and state on disk, by `torch.distributed.checkpoint`: saved on some ranks, restored on others."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pegrad import trees
from pegrad.distributed.groups import Group, Mesh, group_of
from pegrad.dp_sgd import State
from pegrad.errors import DataFileError
from pegrad.trees import PyTree


class Restored(NamedTuple):
    """Where a run goes on: what `restore` returns."""

    params: PyTree
    state: State


def save(folder: str | Path, params: PyTree, state: State, mesh: Mesh = None) -> None:
    """Write parameters and state, each rank what it has; all ranks must call it.

    The folder holds the run's key, so it is as secret as that: see `pegrad.dp_sgd.State`.

    Args:
        folder: where to: a new one every time, so that the last checkpoint stays whole if a rank dies.
        params: sharded or not.
        state: of the step that led there.
        mesh: the ranks, as for `data_parallel`.

    Guarantee: `restore` takes no folder for whole in which a rank had not finished. Bound to
        `test_half_a_checkpoint_is_none`.
    """
    group = group_of(mesh)
    tensors, others = _sorted(params, state)
    with _by(group) as by:
        dcp.save(tensors, checkpoint_id=folder, **by)
    if group.rank == 0:  # last, when all ranks have written
        with open(_rest(folder), "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            torch.save((state._replace(optimizer=None), others), file)
    group.wait()


def restore(folder: str | Path, params: PyTree, state: State, mesh: Mesh = None) -> Restored:
    """Read what `save` wrote, on as many ranks as there are now; all ranks must call it.

    Args:
        folder: as for `save`.
        params: laid out as they are wanted, sharded over the ranks that there are now, or not; values do not count.
        state: of `init` with these parameters; likewise.
        mesh: the ranks, as for `data_parallel`.

    Returns:
        Parameters and state, laid out like the arguments, which stay as they are: bit for bit what was saved.

    Raises:
        DataFileError: the folder holds no whole checkpoint, or one of other parameters.
    """
    group = group_of(mesh)
    leaves, spec = trees.flatten((params, state.optimizer))
    fresh = trees.unflatten(spec, [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    tensors, numbers = _sorted(fresh[0], state._replace(optimizer=fresh[1]))
    try:
        rest, others = torch.load(_rest(folder), weights_only=True)
        with _by(group) as by:
            dcp.load(tensors, checkpoint_id=folder, **by)
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise DataFileError(
            f"{folder} holds no whole checkpoint of these parameters and this optimizer: {type(error).__name__}"
        ) from error
    if others.keys() != numbers.keys():
        raise DataFileError(f"{folder} holds a checkpoint of another optimizer: {sorted(others)} beside its tensors")
    found = [(tensors | others)[name] for name in _names((params, state.optimizer))]
    params, optimizer = trees.unflatten(spec, found)
    return Restored(params, rest._replace(optimizer=optimizer))


@contextmanager
def _by(group: Group) -> Iterator[dict[str, Any]]:
    """Say who writes or reads; that one process does it alone is meant, and no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"process_group": group.process_group, "no_dist": group.size == 1}


def _sorted(params: PyTree, state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Name what a run has: its tensors, and the optimizer's numbers."""
    both = params, state.optimizer
    named = dict(zip(_names(both), trees.leaves(both), strict=True))
    tensors = {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}
    return tensors, {name: leaf for name, leaf in named.items() if not isinstance(leaf, Tensor)}


def _names(both: PyTree) -> list[str]:
    roots = {"[0]": "params", "[1]": "optimizer"}
    return [roots[path[:3]] + path[3:] for path in trees.paths(both)]


def _rest(folder: str | Path) -> Path:
    return Path(folder, "state.pt")
