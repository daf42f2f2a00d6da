"""A run as it is kept in its folder while it lasts, so that it can go on where it was cut off."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad.errors import ArgumentError, DataFileError
from pegrad.papers.training import Evaluation, Progress

NAME = "checkpoint.pt"


class Checkpoint(NamedTuple):
    """A run so far. Secret: it holds the run's keys, and losses and norms of single examples."""

    settings: dict[str, Any]
    """What the run was started with, by name."""
    seeded: bool
    """Its key came from a seed."""
    progress: Progress
    history: list[Evaluation]
    losses: list[float]
    """Each step's mean loss."""
    norms: list[Tensor]
    """Each step's gradient norms `(B,)`; `(0,)` without privacy."""
    seconds: float
    """How long the steps took."""


torch.serialization.add_safe_globals([Checkpoint])  # for torch.load's default, weights_only=True


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the place of the one before, for the owner's eyes only.

    Guarantee: whenever it is cut off, the folder holds a whole checkpoint, this one or the one before. Bound to
    `test_a_checkpoint_is_whole_whenever_writing_is_cut_off`.
    """
    part = _part(folder)
    with open(part, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / NAME)


def load(folder: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """Read a run that was cut off. No code that the file may hold is run.

    Args:
        folder: the run's.
        settings: what it is to go on with.

    Raises:
        ArgumentError: there is no such run, or it was started with other settings.
        DataFileError: the file is no checkpoint, or its tensors are of a device that is not here.
    """
    path = folder / NAME
    if not path.exists():
        raise ArgumentError(
            f"There is no run to go on with in {folder}: it has no {NAME}, which a finished run removes"
        )
    try:
        checkpoint = torch.load(path, weights_only=True)
    except Exception as error:  # of many types, some private to torch
        raise DataFileError(f"{path} cannot be read as a checkpoint: {type(error).__name__}") from error
    if not isinstance(checkpoint, Checkpoint):
        raise DataFileError(f"{path} is no checkpoint of pegrad train")
    before = checkpoint.settings
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        others = ", ".join(f"{name} {before.get(name)}, not {settings.get(name)}" for name in names)
        raise ArgumentError(f"The run in {folder} was started with other settings: {others}")
    return checkpoint


def refuse_to_overwrite(folder: Path) -> None:
    """See to it that a new run does not take the place of one that was cut off, and of what that has spent.

    Raises:
        ArgumentError: the folder holds such a run.
    """
    if (folder / NAME).exists():
        raise ArgumentError(
            f"{folder} holds a run that was cut off: go on with it by --resume, write elsewhere by --out, or remove "
            f"its {NAME}; what it has released stays released"
        )


def discard(folder: Path) -> None:
    """Remove the checkpoint of a run that is over, and its keys."""
    (folder / NAME).unlink(missing_ok=True)
    _part(folder).unlink(missing_ok=True)


def _part(folder: Path) -> Path:
    return folder / f"{NAME}.part"
