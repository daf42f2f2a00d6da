"""Batches whose examples are dealt out at random: into blocks that take turns, or anew in every epoch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pegrad import random
from pegrad._validate import check_integer, check_rate
from pegrad.sampling.draws import Draw, padded
from pegrad.sampling.sizes import BinomialSize


@dataclass(frozen=True)
class CyclicPoissonSampler(BinomialSize):
    """Poisson sampling from one block of the data set at a time; the blocks take turns.

    Guarantee:
        Example i belongs to one block for the whole run, drawn from the key uniformly (to 2^-53) and independently of
        all other examples. At step t only the block t mod b is sampled, each of its examples independently with
        probability floor(q·2^53)/2^53. So an example takes part in at most ⌈T/b⌉ of T steps, and whether it is in the
        data set changes nothing for the others. Tests: `test_cyclic_blocks_take_turns`,
        `test_cyclic_includes_at_the_rate`, `test_cyclic_blocks_are_independent`.

    The blocks are drawn, not cut by position, because removing an example would then move the others to other blocks.

    Args:
        num_examples: n, the number of rows of the data set, at least 1. Public.
        sampling_rate: q in (0, 1], within a block; 1 takes whole blocks.
        num_blocks: b, at least 1; 1 is Poisson sampling.
        max_batch_size: M >= 1, the rows of every draw; a draw that does not fit raises `BatchOverflowError`. None: the
            least M that n - 1 examples fill with probability at most 1e-24 in a step.

    Raises:
        ArgumentError: an argument is out of range.

    Source:
        Choquette-Choo et al., "(Amplified) banded matrix factorization", 2023, with blocks drawn at random.
    """

    num_examples: int
    sampling_rate: float
    num_blocks: int
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_integer("num_examples", self.num_examples, 1)
        check_rate("sampling_rate", self.sampling_rate)
        check_integer("num_blocks", self.num_blocks, 1)
        if self.max_batch_size is not None:
            check_integer("max_batch_size", self.max_batch_size, 1)

    @property
    def inclusion_rate(self) -> float:
        """q/b, the probability that an example is in the batch of a step."""
        return self.sampling_rate / self.num_blocks

    def __call__(self, key: Tensor, step: int) -> Draw:
        """Draw the batch of a step.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
            step: the number of the step, at least 0.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
            BatchOverflowError: more than M examples were drawn.
        """
        check_integer("step", step, 0)
        block_key, steps_key = random.split(key)
        turn = _dealt(block_key, self.num_examples, self.num_blocks) == step % self.num_blocks
        uniforms = _uniforms(random.fold_in(steps_key, step), self.num_examples)
        drawn = (turn & (uniforms <= self.sampling_rate)).nonzero().squeeze(1)
        if len(drawn) > self.rows:
            raise self._overflow_error(step)
        return padded(drawn, self.rows)


@dataclass(frozen=True)
class BallsInBinsSampler(BinomialSize):
    """Each example is in exactly one batch of each epoch, at a step of its own that is drawn anew for every epoch.

    Guarantee:
        In each epoch of b steps example i is in the batch of one step, uniform over the b (to 2^-53) and independent
        over examples and epochs. Tests: `test_balls_in_bins_deals_each_example_once`,
        `test_balls_in_bins_is_uniform_and_independent`.

    It sees every example equally often, as shuffling does, and yet has an accountant: the place of an example tells
    nothing of the others'. The size of a batch is random. What is accounted is whole epochs.

    Args:
        num_examples: n, the number of rows of the data set, at least 1. Public.
        steps_per_epoch: b, the number of bins, at least 1.
        max_batch_size: M >= 1, the rows of every draw; a draw that does not fit raises `BatchOverflowError`. None: the
            least M that n - 1 examples fill with probability at most 1e-24 in a step.

    Raises:
        ArgumentError: an argument is out of range.

    Source:
        Chua et al., "Balls-and-bins sampling for DP-SGD", 2024; Feldman and Shenfeld, "Privacy amplification by random
        allocation", 2025.
    """

    num_examples: int
    steps_per_epoch: int
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_integer("num_examples", self.num_examples, 1)
        check_integer("steps_per_epoch", self.steps_per_epoch, 1)
        if self.max_batch_size is not None:
            check_integer("max_batch_size", self.max_batch_size, 1)

    @property
    def inclusion_rate(self) -> float:
        """1/b, the probability that an example is in the batch of a step."""
        return 1 / self.steps_per_epoch

    def __call__(self, key: Tensor, step: int) -> Draw:
        """Draw the batch of a step, which lies in epoch `step // steps_per_epoch`.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
            step: the number of the step, at least 0.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
            BatchOverflowError: more than M examples were drawn.
        """
        check_integer("step", step, 0)
        epoch, position = divmod(step, self.steps_per_epoch)
        bins = _dealt(random.fold_in(key, epoch), self.num_examples, self.steps_per_epoch)
        drawn = (bins == position).nonzero().squeeze(1)
        if len(drawn) > self.rows:
            raise self._overflow_error(step)
        return padded(drawn, self.rows)


def _dealt(key: Tensor, count: int, parts: int) -> Tensor:
    """Deal `count` examples out to `parts` parts: `int64` (count,), independent and uniform."""
    return (_uniforms(key, count) * parts).ceil().long().sub_(1).clamp_(0, parts - 1)


def _uniforms(key: Tensor, count: int) -> Tensor:
    return random.uniform(key, (count,), dtype=torch.float64, device="cpu")
