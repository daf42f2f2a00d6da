"""Poisson sampling: each example is in each batch by a toss of its own."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pegrad import random
from pegrad._validate import check_integer, check_rate
from pegrad.errors import ArgumentError
from pegrad.sampling.draws import Draw, padded
from pegrad.sampling.sizes import BinomialSize


@dataclass(frozen=True)
class PoissonSampler(BinomialSize):
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
        check_integer("num_examples", self.num_examples, 1)
        check_rate("sampling_rate", self.sampling_rate)
        if self.max_batch_size is not None:
            check_integer("max_batch_size", self.max_batch_size, 1)
        if self.on_overflow not in ("error", "truncate"):
            raise ArgumentError(f"Expected on_overflow 'error' or 'truncate', got {self.on_overflow!r}.")

    @property
    def inclusion_rate(self) -> float:
        """q, the probability that an example is in the batch of a step."""
        return self.sampling_rate

    def __call__(self, key: Tensor, step: int) -> Draw:
        """Draw the batch of a step.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
            step: the number of the step, at least 0.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
            BatchOverflowError: more than M examples were drawn, and `on_overflow` is "error".
        """
        check_integer("step", step, 0)
        include_key, truncate_key = random.split(random.fold_in(key, step))
        uniforms = random.uniform(include_key, (self.num_examples,), dtype=torch.float64, device="cpu")
        drawn = (uniforms <= self.sampling_rate).nonzero().squeeze(1)
        overflow = max(0, len(drawn) - self.rows)
        if overflow and self.on_overflow == "error":
            raise self._overflow_error(step, ", or set on_overflow='truncate', which the accountant charges for")
        if overflow:
            drawn = drawn[random.permutation(truncate_key, len(drawn))[: self.rows]]
        return padded(drawn, self.rows, overflow)
