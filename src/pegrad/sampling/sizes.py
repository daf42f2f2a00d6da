"""How many rows a batch needs whose number of examples is random."""

import math
from abc import ABC, abstractmethod
from functools import cached_property

from pegrad.errors import BatchOverflowError

# What the default maximum of a batch adds to delta in one step: next to nothing beside any, over any run.
OVERFLOW_PROBABILITY = 1e-24


class BinomialSize(ABC):
    """A sampler whose batches hold each of n examples with one probability, independently of the other examples."""

    num_examples: int
    max_batch_size: int | None

    @property
    @abstractmethod
    def inclusion_rate(self) -> float:
        """The probability that an example is in the batch of a step."""

    @property
    def expected_batch_size(self) -> float:
        """The mean number of examples in a batch: the constant to divide a sum of gradients by."""
        return self.num_examples * self.inclusion_rate

    @cached_property
    def rows(self) -> int:
        """M, the number of rows of every draw."""
        if self.max_batch_size is not None:
            return self.max_batch_size
        return 1 + _binomial_quantile(self.num_examples - 1, self.inclusion_rate, OVERFLOW_PROBABILITY)

    @cached_property
    def overflow_probability(self) -> float:
        """The probability P[Binomial(n, rate) > M] that one step draws more examples than fit."""
        return binomial_tail(self.num_examples, self.inclusion_rate, self.rows)

    def _overflow_error(self, step: int, advice: str = "") -> BatchOverflowError:
        return BatchOverflowError(
            f"Step {step} drew more than max_batch_size={self.rows} of {self.num_examples} examples, which "
            f"happens with probability {self.overflow_probability:.1e} a step; raise max_batch_size{advice}."
        )


def _binomial_quantile(n: int, q: float, tail: float) -> int:
    """The least m >= 0 with P[Binomial(n, q) > m] <= tail, by bisection."""
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_tail(n, q, middle) <= tail:
            high = middle
        else:
            low = middle
    return high


def binomial_tail(n: int, q: float, m: int) -> float:
    """Return P[Binomial(n, q) > m], by summing the side of the mean on which the terms decrease outwards."""
    if m < 0:
        return 1.0
    if m >= n or q == 1:
        return float(m < n)
    if m + 1 < n * q:
        return 1.0 - binomial_tail(n, 1 - q, n - m - 1)
    k = m + 1
    log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    term = math.exp(log_term + k * math.log(q) + (n - k) * math.log1p(-q))
    total = 0.0
    while term > total * 1e-17:
        total += term
        term *= (n - k) / (k + 1) * (q / (1 - q))
        k += 1
    return total
