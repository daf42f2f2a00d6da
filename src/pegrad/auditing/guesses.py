"""From the scores of canaries to guesses, and from the guesses to a lower bound on epsilon."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pegrad import random
from pegrad.auditing.bounds import check_test, clopper_pearson, clopper_pearson_bounds, epsilon_lower_bound
from pegrad.errors import ArgumentError

# By default the auditor guesses on all canaries, half of them, a quarter, and so on down to this many.
_FEWEST_GUESSES = 16


class OneRun(NamedTuple):
    """What the canaries of one run say of its ε."""

    epsilon: float
    """The lower bound, >= 0."""
    correct: int
    """Right guesses, among those that gave the bound."""
    guesses: int
    """Guesses made."""
    m: int
    """Canaries, in the data set or not."""


def coins(key: Tensor, m: int) -> Tensor:
    """Toss the fair coins that decide which canaries are in the data set.

    Args:
        key: a key that is used for nothing else; see `pegrad.random`. The training must not see it.
        m: how many canaries, at least 0.

    Returns:
        `(m,)`, boolean, on the CPU: True for a canary that is in the data set.

    Raises:
        ArgumentError: `key` is no key, or `m` is negative or not an integer.
    """
    return random.uniform(key, (m,), dtype=torch.float64, device="cpu") <= 0.5


def one_run(
    scores: Tensor,
    included: Tensor,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
) -> OneRun:
    """Bound ε from below by how well scores tell the canaries of one run from those left out.

    For each number of guesses r, the auditor says "in" of the ceil(r/2) canaries of the highest scores and "out" of the
    floor(r/2) of the lowest, and abstains on the rest. Each of K numbers is a test at level `(1 - confidence) / K`.

    Args:
        scores: `(m,)`, finite, high for what the auditor takes to be in: any function of what the run released, of the
            canaries, and of anything else that is independent of the coins.
        included: `(m,)`, boolean: the coins, fair and independent, of `coins`.
        delta: δ in [0, 1).
        confidence: in (0, 1).
        guesses: the numbers r to try, each in 1..m, chosen before the scores were seen. None: m, m/2, m/4, ..., 16.

    Returns:
        A `OneRun`, of the number of guesses that gives the largest bound.

    Raises:
        ArgumentError: a number out of its bounds, or scores that are not finite.
        MissingExtraError: scipy is not installed.

    Guarantee: for a mechanism that is (ε, δ)-DP for adding or removing one example, `epsilon` is at most ε with
    probability at least `confidence`. Bound to `test_the_bound_holds_for_the_worst_mechanism`.

    Source: Steinke, Nasr & Jagielski 2023, arXiv 2305.08846, Algorithm 1.
    """
    check_test(delta, confidence)
    m = _check_scores("scores", scores)
    check_included(included, m)
    tried = _halvings(m) if guesses is None else list(guesses)
    if not tried or any(not isinstance(r, int) or not 1 <= r <= m for r in tried):
        raise ArgumentError(f"Expected guesses to be one or more integers in 1..{m}, got guesses={guesses!r}")
    ranked = included.cpu()[torch.argsort(scores.detach().cpu(), descending=True, stable=True)]
    level = 1 - (1 - confidence) / len(tried)
    found = []
    for r in tried:
        top, bottom = ranked[: r - r // 2], ranked[m - r // 2 :]
        correct = int(top.sum()) + int((~bottom).sum())
        found.append(OneRun(epsilon_lower_bound(correct, r, m, delta, level), correct, r, m))
    return max(found, key=lambda answer: answer.epsilon)


def repeated_runs(with_canary: Tensor, without_canary: Tensor, *, delta: float, confidence: float = 0.95) -> float:
    """Bound ε from below by one canary's scores over independent runs with it and without it.

    The first half of the runs chooses the threshold above which a score says "in", the second half is tested.

    Args:
        with_canary: `(N,)`, N >= 2, finite: one score for each run on the data set with the canary.
        without_canary: `(M,)`, M >= 2, finite: one for each run on the data set without it.
        delta: δ in [0, 1).
        confidence: in (0, 1).

    Returns:
        The bound of `clopper_pearson`, ε >= 0.

    Raises:
        ArgumentError: a number out of its bounds, or scores that are not finite.
        MissingExtraError: scipy is not installed.

    Guarantee: for a mechanism that is (ε, δ)-DP for adding or removing one example, the bound is at most ε with
    probability at least `confidence`. The runs must have keys of their own. Bound to
    `test_the_bound_of_repeated_runs_holds`.

    Source: Jagielski, Ullman & Oprea 2020, arXiv 2006.07709, Algorithm 1.
    """
    check_test(delta, confidence)
    halves = []
    for name, scores in (("with_canary", with_canary), ("without_canary", without_canary)):
        runs = _check_scores(name, scores)
        if runs < 2:
            raise ArgumentError(f"Expected {name} to hold at least 2 runs, got {runs}")
        halves.append(scores.detach().cpu().double().numpy())
    (choose_in, test_in), (choose_out, test_out) = ((half[: len(half) // 2], half[len(half) // 2 :]) for half in halves)
    seen = np.unique(np.concatenate([choose_in, choose_out]))
    thresholds = np.concatenate([seen[:1], seen[:-1] / 2 + seen[1:] / 2])
    bounds = clopper_pearson_bounds(
        len(choose_in) - np.searchsorted(np.sort(choose_in), thresholds, side="right"),
        len(choose_in),
        len(choose_out) - np.searchsorted(np.sort(choose_out), thresholds, side="right"),
        len(choose_out),
        delta,
        confidence,
    )
    threshold = thresholds[bounds.argmax()]
    hits, alarms = int((test_in > threshold).sum()), int((test_out > threshold).sum())
    return clopper_pearson(hits, len(test_in), alarms, len(test_out), delta, confidence)


def check_included(included: Tensor, m: int) -> None:
    """Raise `ArgumentError` unless `included` is boolean `(m,)`."""
    if not isinstance(included, Tensor) or included.dtype != torch.bool or included.shape != (m,):
        raise ArgumentError(f"Expected included to be a boolean tensor of shape ({m},), one coin for each canary")


def _halvings(m: int) -> list[int]:
    numbers = [m]
    while numbers[-1] // 2 >= _FEWEST_GUESSES:
        numbers.append(numbers[-1] // 2)
    return numbers


def _check_scores(name: str, scores: Tensor) -> int:
    if not isinstance(scores, Tensor) or scores.dim() != 1 or not len(scores):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ArgumentError(f"Expected {name} to be a tensor of one axis and at least one number, got {shape}")
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ArgumentError(f"{bad} of {len(scores)} {name} are not finite: the order of such scores means nothing")
    return len(scores)
