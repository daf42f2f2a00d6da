"""Batches of a fixed size: subsets drawn anew at each step, and the pieces of a shuffle."""

import math
from dataclasses import dataclass

from torch import Tensor

from pegrad import random
from pegrad._validate import check_integer
from pegrad.errors import ArgumentError
from pegrad.sampling.draws import Draw, padded


@dataclass(frozen=True)
class FixedSizeSampler:
    """A uniformly random subset of a fixed size at each step, independently of the other steps.

    Guarantee:
        The batch of step t is the first M of a permutation that belongs to t alone (`pegrad.random.permutation`): each
        of the subsets of M rows is as likely as every other, and nothing is padding. Tests:
        `test_fixed_size_draws_each_subset_alike`, `test_fixed_size_steps_are_independent`.

    The number of examples drawn is known, so the neighbours that are accounted for differ by the replacement of one
    example, not by its addition or removal. Replacing one moves the sum by up to twice the clip norm: at the same noise
    multiplier ε is larger than that of `PoissonSampler`.

    Args:
        num_examples: n, the number of rows of the data set, at least 1. Public.
        batch_size: M, from 1 to n. Public.

    Raises:
        ArgumentError: an argument is out of range.

    Source:
        Wang, Balle and Kasiviswanathan, "Subsampled Rényi differential privacy and analytical moments accountant",
        2019.
    """

    num_examples: int
    batch_size: int

    def __post_init__(self) -> None:
        check_integer("num_examples", self.num_examples, 1)
        check_integer("batch_size", self.batch_size, 1)
        if self.batch_size > self.num_examples:
            raise ArgumentError(
                f"Expected batch_size <= num_examples={self.num_examples}, got batch_size={self.batch_size}."
            )

    @property
    def rows(self) -> int:
        """M, the number of rows of every draw."""
        return self.batch_size

    @property
    def expected_batch_size(self) -> float:
        """M: the constant to divide a sum of gradients by."""
        return float(self.batch_size)

    def __call__(self, key: Tensor, step: int) -> Draw:
        """Draw the batch of a step.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
            step: the number of the step, at least 0.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
        """
        check_integer("step", step, 0)
        order = random.permutation(random.fold_in(key, step), self.num_examples)
        return padded(order[: self.batch_size], self.batch_size)


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
        check_integer("num_examples", self.num_examples, 1)
        check_integer("batch_size", self.batch_size, 1)

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
        check_integer("step", step, 0)
        epoch, position = divmod(step, self.steps_per_epoch)
        order = random.permutation(random.fold_in(key, epoch), self.num_examples)
        return padded(order[position * self.batch_size :][: self.batch_size], self.batch_size)
