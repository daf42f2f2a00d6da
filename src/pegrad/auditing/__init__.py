"""Does a run of DP-SGD leak more than it was accounted for? Lower bounds on ε from canaries, and replays.

Accounting bounds ε from above, for the step that was meant. An audit bounds it from below, for the step that ran: a
lower bound above the accounted ε means a bug. A lower bound below it proves nothing by itself.

    step = pegrad.dp_sgd(loss, auditing.recording(optimizer), ...)
    included = auditing.coins(key, m)                                   # which of m canaries are in the data set
    found = auditing.audit(step, params, state, batches, canaries=canaries, included=included,
                           score=auditing.score(loss, clip_norm=1.0), delta=1e-5)
    assert found.epsilon <= pegrad.accounting.epsilon(event, delta=1e-5)

`audit` needs one run and many canaries. `repeated_runs` needs many runs and one canary, for what touches a single
example only. `replay` needs two steps and compares what they released, number by number.
"""

from pegrad.auditing.bounds import clopper_pearson, epsilon_lower_bound, p_value
from pegrad.auditing.canaries import Recorded, audit, change, level, observe, recording, score
from pegrad.auditing.guesses import OneRun, coins, one_run, repeated_runs
from pegrad.auditing.replay import Replay, replay

__all__ = [
    "OneRun",
    "Recorded",
    "Replay",
    "audit",
    "change",
    "clopper_pearson",
    "coins",
    "epsilon_lower_bound",
    "level",
    "observe",
    "one_run",
    "p_value",
    "recording",
    "repeated_runs",
    "replay",
    "score",
]
