"""Random batches as pure functions of a key and a step, padded to one size.

A sampler says which rows of the data set make up the batch of a step. Every batch has the same number of rows, so
compiled code and memory never change size; a mask tells examples from padding. The accountant of
`pegrad.accounting` derives its event from the sampler.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pegrad import random, trees
from pegrad.errors import ArgumentError, BatchOverflowError

# What the default maximum of a Poisson batch adds to delta in one step: next to nothing beside any, over any run.
OVERFLOW_PROBABILITY = 1e-24


class Draw(NamedTuple):
    """The rows that make up one batch.

    Which examples were drawn, and how many, is what amplification by sampling keeps secret: the accounted epsilon
    does not cover publishing any of these fields.
    """

    indices: Tensor
    """`int64` (M,), rows of the data set; 0 where the row is padding."""
    mask: Tensor
    """`bool` (M,), True where the row is an example."""
    truncated: int = 0
    """How many drawn examples were left out because the batch was full."""


@dataclass(frozen=True)
class PoissonSampler:
    """Each example is in the batch of each step independently with the same probability.

    Guarantee:
        Example i is drawn at step t when its own 53-bit uniform, from a stream that belongs to t alone, is at most
        `sampling_rate`: probability floor(q·2^53)/2^53, independent over examples and steps. Tests:
        `test_poisson_includes_at_the_sampling_rate`, `test_poisson_pairs_are_independent`.

    Calling it with a key and a step gives that step's `Draw`, with `rows` rows. The key must stay secret, and what is
    drawn with it: sampling amplifies privacy only against those who do not know who is in the batch.

    Args:
        num_examples: n, the number of rows of the data set, at least 1. Public.
        sampling_rate: q in (0, 1].
        max_batch_size: M >= 1, the rows of every draw. None: the least M that n - 1 examples fill with probability
            at most 1e-24 in a step, a function of n and q alone.
        on_overflow: what happens when more than M examples are drawn. "error" raises `BatchOverflowError`,
            "truncate" keeps a uniformly random M of them. Neither is quite Poisson sampling, and
            `pegrad.accounting.epsilon` charges for the difference.

    Raises:
        ArgumentError: an argument is out of range.

    Example:
        >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.01)
        >>> draw = sampler(random.key(0), step=0)
        >>> draw.indices.shape == draw.mask.shape == (sampler.rows,)
        True
    """

    num_examples: int
    sampling_rate: float
    max_batch_size: int | None = None
    on_overflow: Literal["error", "truncate"] = "error"

    def __post_init__(self) -> None:
        _check_integer("num_examples", self.num_examples, 1)
        if not 0 < self.sampling_rate <= 1:
            raise ArgumentError(f"Expected 0 < sampling_rate <= 1, got sampling_rate={self.sampling_rate}.")
        if self.max_batch_size is not None:
            _check_integer("max_batch_size", self.max_batch_size, 1)
        if self.on_overflow not in ("error", "truncate"):
            raise ArgumentError(f"Expected on_overflow 'error' or 'truncate', got {self.on_overflow!r}.")

    @property
    def expected_batch_size(self) -> float:
        """The mean number of examples in a batch, n·q: the constant to divide a sum of gradients by."""
        return self.num_examples * self.sampling_rate

    @cached_property
    def rows(self) -> int:
        """M, the number of rows of every draw."""
        if self.max_batch_size is not None:
            return self.max_batch_size
        return 1 + _binomial_quantile(self.num_examples - 1, self.sampling_rate, OVERFLOW_PROBABILITY)

    @cached_property
    def overflow_probability(self) -> float:
        """The probability P[Binomial(n, q) > M] that one step draws more examples than fit."""
        return binomial_tail(self.num_examples, self.sampling_rate, self.rows)

    def __call__(self, key: Tensor, step: int) -> Draw:
        """Draw the batch of a step.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
            step: the number of the step, at least 0.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
            BatchOverflowError: more than M examples were drawn, and `on_overflow` is "error".
        """
        _check_integer("step", step, 0)
        include_key, truncate_key = random.split(random.fold_in(key, step))
        uniforms = random.uniform(include_key, (self.num_examples,), dtype=torch.float64, device="cpu")
        drawn = (uniforms <= self.sampling_rate).nonzero().squeeze(1)
        overflow = max(0, len(drawn) - self.rows)
        if overflow and self.on_overflow == "error":
            raise BatchOverflowError(
                f"Step {step} drew more than max_batch_size={self.rows} of {self.num_examples} examples, which "
                f"happens with probability {self.overflow_probability:.1e} a step; raise max_batch_size, or set "
                "on_overflow='truncate', which the accountant charges for."
            )
        if overflow:
            drawn = drawn[random.permutation(truncate_key, len(drawn))[: self.rows]]
        return _padded(drawn, self.rows, overflow)


@dataclass(frozen=True)
class ShuffledSampler:
    """Batches of a fixed size out of a fresh shuffle of the data set for each epoch.

    Each example comes once an epoch, and the last batch of an epoch is padded. Batches of one epoch depend on each
    other, so this is not Poisson sampling, and `pegrad.accounting` refuses it: it is for training without privacy
    and for evaluation. Each call draws the whole shuffle anew: a few milliseconds for 100,000 examples.

    Args:
        num_examples: n, the number of rows of the data set, at least 1.
        batch_size: M, the rows of every draw, at least 1.

    Raises:
        ArgumentError: an argument is out of range.
    """

    num_examples: int
    batch_size: int

    def __post_init__(self) -> None:
        _check_integer("num_examples", self.num_examples, 1)
        _check_integer("batch_size", self.batch_size, 1)

    @property
    def rows(self) -> int:
        """M, the number of rows of every draw."""
        return self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """How many batches cover the data set once."""
        return math.ceil(self.num_examples / self.batch_size)

    def __call__(self, key: Tensor, step: int) -> Draw:
        """Draw the batch of a step, which lies in epoch `step // steps_per_epoch`.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else.
            step: the number of the step, at least 0.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
        """
        _check_integer("step", step, 0)
        epoch, position = divmod(step, self.steps_per_epoch)
        order = random.permutation(random.fold_in(key, epoch), self.num_examples)
        return _padded(order[position * self.batch_size :][: self.batch_size], self.batch_size)


Sampler = PoissonSampler | ShuffledSampler


def gather(dataset: trees.PyTree, draw: Draw) -> trees.PyTree:
    """Take the drawn rows of a data set.

    Args:
        dataset: a pytree of tensors with one leading axis, the examples.
        draw: which rows; padding repeats row 0, and only `draw.mask` tells.

    Returns:
        The batch: the same pytree with leading axis M, on the data set's device.

    Raises:
        LeafError: a leaf is not a tensor, or the leaves disagree on the leading axis.
        ArgumentError: the data set has fewer rows than the sampler was told.
    """
    leaves, spec, rows = trees.flatten_batch(dataset)
    if draw.indices.max() >= rows:
        raise ArgumentError(
            f"The data set has {rows} rows, but the draw comes from more: give the sampler num_examples={rows}."
        )
    return trees.unflatten(spec, [leaf[draw.indices.to(leaf.device)] for leaf in leaves])


def _padded(examples: Tensor, rows: int, truncated: int = 0) -> Draw:
    indices = torch.zeros(rows, dtype=torch.int64, device="cpu")
    indices[: len(examples)] = examples
    return Draw(indices, torch.arange(rows, device="cpu") < len(examples), truncated)


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


def _check_integer(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ArgumentError(f"Expected {name} to be an integer >= {least}, got {name}={value!r}.")
