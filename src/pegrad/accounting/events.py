"""What a run releases, as events: one for each kind of neighbour, composed over steps and runs."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from pegrad.accounting.accountants import Relation
from pegrad.accounting.extra import dp_accounting
from pegrad.errors import ArgumentError

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class Event(NamedTuple):
    """What a run releases, in dp-accounting's terms. Made by `dp_event`.

    A data set has two kinds of neighbours, and what truncated batches cost depends on the size of the larger one of
    two. So there are two events; both must be paid for, and for Poisson batches they are the same. Under replacement
    there is one kind, and they are the same.
    """

    removal: DpEvent
    """The run, against the same run on the data set without one of its examples."""
    addition: DpEvent
    """The run, against the same run on the data set with one example more."""
    overflow: float = 0.0
    """A bound on the probability that the run is not what the events describe, because a draw may not fit into the
    batch; it adds to δ."""
    relation: Relation = "add_or_remove"
    """How neighbouring data sets differ: by the addition or removal of one example (or user), or by the replacement of
    one."""


def compose(*events: Event) -> Event:
    """Describe several runs in a row on one data set as one.

    Raises:
        ArgumentError: some events are for the addition or removal of an example, some for the replacement of one.

    >>> from pegrad.accounting import dp_event, epsilon
    >>> from pegrad.sampling import PoissonSampler
    >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.04)
    >>> warm_up, training = dp_event(2.0, sampler, steps=50), dp_event(1.5, sampler, steps=2250)
    >>> epsilon(compose(warm_up, training), delta=1e-5) > epsilon(training, delta=1e-5)
    True
    """
    dp = dp_accounting()
    if not events:
        return Event(dp.NoOpDpEvent(), dp.NoOpDpEvent())
    removals, additions, overflows, relations = zip(*events, strict=True)
    if len(set(relations)) > 1:
        raise ArgumentError(
            "Expected events of one relation, got some for the addition or removal of an example and some, of "
            "FixedSizeSampler, for the replacement of one: no epsilon covers both."
        )
    return Event(
        dp.ComposedDpEvent(list(removals)),
        dp.ComposedDpEvent(list(additions)),
        min(1.0, math.fsum(overflows)),
        relations[0],
    )


def repeated(
    dp: ModuleType, pairs: list, count: int, overflow: float = 0.0, relation: Relation = "add_or_remove"
) -> Event:
    """Compose a step's events, removal and addition, with themselves."""
    removal, addition = (dp.SelfComposedDpEvent(event, count) for event in pairs)
    return Event(removal, addition, min(1.0, overflow), relation)
