"""What a run of DP-SGD costs: epsilon for a delta, over dp-accounting.

The event that is accounted comes from the sampler itself, so the batches that are drawn and the batches that are
paid for are the same. Which data sets are neighbours follows from the sampler too. Where the number of examples in a
batch is random, they differ by the addition or removal of one example, and the sampler runs on both, with the number of
examples of each. Where it is fixed, they differ by the replacement of one. `docs/sampling.md` has the table.

An epsilon holds for those who see what the steps release. It does not hold for those who have the run's key or seed, or
know which examples were drawn.

dp-accounting is optional: `pip install "pegrad[accounting]"`. It is imported when a function here needs it.
"""

from pegrad.accounting.accountants import Relation
from pegrad.accounting.calibration import noise_multiplier_for
from pegrad.accounting.cost import epsilon, ledger_event
from pegrad.accounting.events import Event, compose
from pegrad.accounting.ledger import Entry, Ledger
from pegrad.accounting.samplers import dp_event
from pegrad.accounting.users import user_event

__all__ = [
    "Entry",
    "Event",
    "Ledger",
    "Relation",
    "compose",
    "dp_event",
    "epsilon",
    "ledger_event",
    "noise_multiplier_for",
    "user_event",
]
