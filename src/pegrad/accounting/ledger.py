"""What a run has released, written down by its steps: a value that the state carries and the accountant reads."""

import math
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch

from pegrad.errors import ArgumentError
from pegrad.sampling import Sampler


class Entry(NamedTuple):
    """Steps in a row that released alike."""

    sampler: Sampler | None
    """How the batches were drawn; None if the step was not told."""
    noise_multiplier: float
    """Standard deviation of the noise on the gradients over their sensitivity."""
    count_noise_multiplier: float | None
    """The same of the counts that adaptive clipping releases beside the gradients; None if there were none."""
    clipping: str
    """What kind of clipping the sensitivity came from."""
    steps: int
    """How many steps, at least 1."""

    @property
    def joint_noise_multiplier(self) -> float:
        """σ of the one Gaussian mechanism that releases gradients and counts together: see `pegrad.Adaptive`."""
        if self.count_noise_multiplier is None:
            return self.noise_multiplier
        return joint(self.noise_multiplier, self.count_noise_multiplier)


class Ledger(NamedTuple):
    """What a run has released, entry by entry; equal steps in a row are one entry, so a million steps are a few.

    `pegrad.accounting.epsilon(state.ledger, delta)` says what it cost. It holds numbers that are public and no data. It
    knows the steps on the way to its state, not those of runs on the same data that were thrown away.
    """

    entries: tuple[Entry, ...] = ()

    @property
    def steps(self) -> int:
        """Steps in all."""
        return sum(entry.steps for entry in self.entries)


torch.serialization.add_safe_globals([Ledger, Entry, *get_args(Sampler)])  # for torch.load, weights_only=True


def recorded(ledger: Ledger | None, entry: Entry) -> Ledger | None:
    """Write an entry into a ledger, and change nothing.

    Guarantee: every entry that was written is paid for, whatever came before it; a ledger that is missing stays so, for
    what is not known cannot be paid for. Bound to `test_the_ledger_pays_for_every_step`.

    Args:
        ledger: what the state carries; None: what was released before is not known.
        entry: what is released now.

    Raises:
        ArgumentError: `ledger` is no `Ledger`.
    """
    if ledger is None:
        return None
    if not isinstance(ledger, Ledger) or not isinstance(ledger.entries, tuple):
        raise ArgumentError(f"Expected state.ledger to be a pegrad.Ledger or None, got {type(ledger).__name__}.")
    *before, last = ledger.entries or (None,)
    if isinstance(last, Entry) and last._replace(steps=entry.steps) == entry:
        return Ledger((*before, entry._replace(steps=last.steps + entry.steps)))
    return Ledger((*ledger.entries, entry))


def checked(ledger: Ledger) -> list[tuple[Entry, Sampler]]:
    """Return the entries of a ledger, each found to be what a step can have written, and their samplers.

    A ledger comes from a file, which may hold anything. Samplers are made anew, so that what a file says they once
    computed is not believed.

    Raises:
        ArgumentError: an entry has a field that no step writes, or no sampler.
    """
    if not isinstance(ledger.entries, tuple):
        raise ArgumentError(f"Expected the ledger's entries to be a tuple, got {type(ledger.entries).__name__}.")
    return [_checked(number, entry) for number, entry in enumerate(ledger.entries)]


def joint(*noise_multipliers: float) -> float:
    """Return σ of one Gaussian mechanism that is as private as several on the same batch together.

    Divide each release by its sensitivity: one example moves the k-th by at most 1, under noise of deviation σ_k.
    Divided by σ_k it moves by 1/σ_k under noise of deviation 1, and all together by √Σ 1/σ_k² = 1/σ.
    """
    if min(noise_multipliers) == 0:
        return 0.0
    return 1 / math.hypot(*(1 / sigma for sigma in noise_multipliers))


def _checked(number: int, entry: Any) -> tuple[Entry, Sampler]:
    def refuse(what: str, got: object) -> ArgumentError:
        return ArgumentError(f"Entry {number} of the ledger: expected {what}, got {got}. The ledger was changed.")

    if not isinstance(entry, Entry):
        raise refuse("a pegrad.Entry", type(entry).__name__)
    if not _number(entry.noise_multiplier):
        raise refuse("noise_multiplier to be a finite number >= 0", repr(entry.noise_multiplier))
    if entry.count_noise_multiplier is not None and not _number(entry.count_noise_multiplier):
        raise refuse("count_noise_multiplier to be None or a finite number >= 0", repr(entry.count_noise_multiplier))
    if type(entry.steps) is not int or entry.steps < 1:
        raise refuse("steps to be a whole number >= 1", repr(entry.steps))
    if entry.sampler is None:
        raise ArgumentError(
            f"Entry {number} of the ledger, {entry.steps} steps, does not say how its batches were drawn, so epsilon "
            "is not known. Tell the step: dp_sgd(..., sampler=sampler)."
        )
    if not isinstance(entry.sampler, get_args(Sampler)):
        raise refuse("a sampler of pegrad.sampling", type(entry.sampler).__name__)
    try:
        return entry, replace(entry.sampler)
    except (TypeError, AttributeError) as error:
        raise refuse("a sampler with the fields of one", type(error).__name__) from None


def _number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]
