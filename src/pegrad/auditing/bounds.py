"""From the number of right guesses to a lower bound on epsilon.

scipy is optional: it comes with `pip install "pegrad[accounting]"`, and is imported when a function here needs it.
"""

import importlib
import math
from typing import Any

import numpy as np

from pegrad.errors import ArgumentError, MissingExtraError

# The bound of one run is found to this precision, and rounded down.
_PRECISION = 1e-6


def p_value(correct: int, guesses: int, m: int, epsilon: float, delta: float) -> float:
    """Bound the probability that so many guesses are right although the mechanism is (ε, δ)-DP.

    Args:
        correct: guesses that were right, in 0..guesses.
        guesses: guesses made, in 0..m; the auditor abstains on the other canaries.
        m: canaries, each of them in the data set by an independent fair coin.
        epsilon: ε >= 0.
        delta: δ in [0, 1).

    Returns:
        A number in (0, 1]: `P[W >= v] + 2mδ · max_i P[v > W >= v - i] / i`, where v is `correct` and W is binomial,
        `guesses` trials of probability `1 / (1 + exp(-ε))`.

    Raises:
        ArgumentError: a number out of its bounds.
        MissingExtraError: scipy is not installed.

    Guarantee: for a mechanism that is (ε, δ)-DP for adding or removing one example, and guesses that are any function
    of what it releases, this number is at most p with probability at most p. Bound to `test_published_values`,
    `test_the_bound_holds_for_the_worst_mechanism`.

    Source: Steinke, Nasr & Jagielski 2023, arXiv 2305.08846, Theorem 5.2 and Corollary 5.4.
    """
    _check_counts(correct=correct, guesses=guesses, m=m)
    _check_delta(delta)
    if not epsilon >= 0:
        raise ArgumentError(f"Expected epsilon >= 0, got epsilon={epsilon}")
    return _p_value(_scipy_stats(), correct, guesses, m, epsilon, delta)


def epsilon_lower_bound(correct: int, guesses: int, m: int, delta: float, confidence: float = 0.95) -> float:
    """Bound ε from below by the right guesses of an auditor who saw one run.

    Args:
        correct: guesses that were right, in 0..guesses.
        guesses: guesses made, in 0..m. How many are made must not depend on which were right.
        m: canaries, each of them in the data set by an independent fair coin.
        delta: δ in [0, 1).
        confidence: in (0, 1).

    Returns:
        The largest ε >= 0, to 1e-6 and rounded down, whose `p_value` is below `1 - confidence`; 0 if there is none.

    Raises:
        ArgumentError: a number out of its bounds.
        MissingExtraError: scipy is not installed.

    Guarantee: for a mechanism that is (ε, δ)-DP, the bound is at most ε with probability at least `confidence`,
    whatever the canaries, the other examples and the guesses are. Bound to
    `test_the_bound_holds_for_the_worst_mechanism`.

    Source: Steinke, Nasr & Jagielski 2023, arXiv 2305.08846, Appendix D.

    >>> round(epsilon_lower_bound(correct=75, guesses=100, m=1000, delta=1e-4), 3)
    0.673
    """
    _check_counts(correct=correct, guesses=guesses, m=m)
    _check_delta(delta)
    _check_confidence(confidence)
    stats = _scipy_stats()

    def rejected(epsilon: float) -> bool:
        return _p_value(stats, correct, guesses, m, epsilon, delta) < 1 - confidence

    # The rejected ε are an interval from 0, so bisection finds its end. With c = 2mδ/i each term of the maximum is
    # f = (1 - c)·P[W >= v] + c·P[W >= v - i]. It rises with ε for c <= 1; for c > 1 it rises, then falls to 1.
    low, high = 0.0, 1.0
    if not rejected(low):
        return low
    while rejected(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def clopper_pearson(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Bound ε from below by the errors of a fixed test over independent runs with and without one canary.

    Args:
        true_positives: runs with the canary that the test said had it, in 0..positives.
        positives: runs with the canary, at least 1.
        false_positives: runs without the canary that the test said had it, in 0..negatives.
        negatives: runs without the canary, at least 1.
        delta: δ in [0, 1).
        confidence: in (0, 1).

    Returns:
        ε >= 0: the larger of `log((TPR - δ) / FPR)` and `log((TNR - δ) / FNR)`, with TPR the lower and FPR the upper
        Clopper-Pearson bound, each of them wrong with probability at most `(1 - confidence) / 2`.

    Raises:
        ArgumentError: a number out of its bounds.
        MissingExtraError: scipy is not installed.

    Guarantee: for a mechanism that is (ε, δ)-DP, the bound is at most ε with probability at least `confidence`, if the
    test was fixed before these runs were seen. Bound to `test_the_bound_of_repeated_runs_holds`.

    Source: Jagielski, Ullman & Oprea 2020, arXiv 2006.07709, Algorithm 1; Clopper & Pearson 1934.

    >>> round(clopper_pearson(1000, 1000, 0, 1000, delta=1e-5), 3)
    5.601
    """
    _check_counts(true_positives=true_positives, positives=positives)
    _check_counts(false_positives=false_positives, negatives=negatives)
    _check_delta(delta)
    _check_confidence(confidence)
    if positives == 0 or negatives == 0:
        raise ArgumentError(f"Expected positives and negatives >= 1, got {positives} and {negatives}")
    return float(clopper_pearson_bounds(true_positives, positives, false_positives, negatives, delta, confidence))


def clopper_pearson_bounds(
    true_positives: Any, positives: int, false_positives: Any, negatives: int, delta: float, confidence: float
) -> Any:
    """Evaluate `clopper_pearson` for numbers or arrays of counts, without checks."""
    beta, tail = _scipy_stats().beta, (1 - confidence) / 2

    def at_least(hits: Any, trials: int) -> Any:
        bound = beta.ppf(tail, np.maximum(hits, 1), trials - np.maximum(hits, 1) + 1)
        return np.where(np.asarray(hits) > 0, bound, 0.0)

    tpr = at_least(true_positives, positives)
    tnr = at_least(negatives - np.asarray(false_positives), negatives)
    ratios = [(tpr - delta) / (1 - tnr), (tnr - delta) / (1 - tpr)]
    return np.log(np.maximum(np.maximum(*ratios), 1.0))


def check_test(delta: float, confidence: float) -> None:
    """Raise `ArgumentError` unless δ is in [0, 1) and the confidence in (0, 1)."""
    _check_delta(delta)
    _check_confidence(confidence)


def _p_value(stats: Any, correct: int, guesses: int, m: int, epsilon: float, delta: float) -> float:
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, accuracy))
    if delta == 0 or correct == 0:
        return min(tail, 1.0)
    fewer = np.arange(1, correct + 1)
    masses = np.cumsum(stats.binom.pmf(correct - fewer, guesses, accuracy))
    return min(tail + 2 * m * delta * float(np.max(masses / fewer)), 1.0)


def _check_counts(**counts: int) -> None:
    """Check that counts are integers that rise from 0 in the order given."""
    least, least_name = 0, "0"
    for name, count in counts.items():
        if not isinstance(count, int) or count < least:
            raise ArgumentError(f"Expected {name} to be an integer >= {least_name}, got {name}={count!r}")
        least, least_name = count, f"{name}={count}"


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise ArgumentError(f"Expected 0 <= delta < 1, got delta={delta}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ArgumentError(f"Expected 0 < confidence < 1, got confidence={confidence}")


def _scipy_stats() -> Any:
    try:
        return importlib.import_module("scipy.stats")
    except ImportError as error:
        raise MissingExtraError(
            'Auditing needs scipy, which is not installed: pip install "pegrad[accounting]".'
        ) from error
