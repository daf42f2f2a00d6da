"""Batches of users: what is drawn, padded and protected is all that a user has."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pegrad import random
from pegrad._validate import check_integer
from pegrad.errors import ArgumentError
from pegrad.sampling.allocation import BallsInBinsSampler, CyclicPoissonSampler
from pegrad.sampling.draws import UserDraw
from pegrad.sampling.fixed import FixedSizeSampler
from pegrad.sampling.poisson import PoissonSampler

RecordSampler = PoissonSampler | CyclicPoissonSampler | BallsInBinsSampler | FixedSizeSampler


@dataclass(frozen=True, eq=False)
class UserSampler:
    """Batches of users, each with up to k records.

    Write one loss for a user, of the k records and their mask, so that a user's gradient is clipped as a whole:

        def loss(params, user):
            (images, labels), present = user                        # (k, ...), (k,), (k,)
            losses = F.cross_entropy(apply(params, images), labels, reduction="none")
            return (losses * present).sum() / present.sum()

    Guarantee:
        Users are drawn as `sampler` draws, and no record of one who was not drawn is in the batch. A user with more
        than k records contributes k of them, uniformly random at each step, by numbers that no other user shares. So
        one user with all its records moves the sum as one example does, and the event of `pegrad.accounting.dp_event`
        counts users. Tests: `test_users_are_drawn_as_examples_are`, `test_a_user_contributes_only_its_own_records`,
        `test_records_beyond_k_are_a_uniform_subset`.

    Args:
        owners: `int64` (number of records,): the user that each row of the data set belongs to, in 0, ..., U - 1.
            Secret, as the data is.
        sampler: draws users: `PoissonSampler`, `CyclicPoissonSampler`, `BallsInBinsSampler` or `FixedSizeSampler`, its
            `num_examples` being U, the number of users.
        max_records: k, at least 1. Public.

    Raises:
        ArgumentError: `owners` does not name a user for each record, `sampler` is no sampler, or `max_records` is out
            of range.

    Example:
        >>> owners = torch.tensor([0, 1, 1, 2, 2, 2])
        >>> sampler = UserSampler(owners, PoissonSampler(num_examples=3, sampling_rate=1.0), max_records=2)
        >>> draw = sampler(random.key(0), step=0)
        >>> draw.records.sum(1)[draw.mask]
        tensor([1, 2, 2])
    """

    owners: Tensor
    sampler: RecordSampler
    max_records: int

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, RecordSampler):
            raise ArgumentError(
                f"Expected sampler to be one that an event describes, such as PoissonSampler(number of users, "
                f"sampling_rate), got {type(self.sampler).__name__}."
            )
        check_integer("max_records", self.max_records, 1)
        owners = self.owners
        if not isinstance(owners, Tensor) or owners.dtype != torch.int64 or owners.dim() != 1 or not len(owners):
            raise ArgumentError("Expected owners to be a torch.int64 tensor of one axis: the user of each record.")
        if owners.min() < 0 or owners.max() >= self.sampler.num_examples:
            raise ArgumentError(
                f"Expected owners from 0 to {self.sampler.num_examples - 1}, the users of the sampler: "
                "number the users, and give the sampler num_examples=their number."
            )

    @cached_property
    def _records(self) -> tuple[Tensor, Tensor, Tensor]:
        """All rows, user after user; how many each user has; and where each user's begin."""
        owners = self.owners.cpu()
        counts = torch.bincount(owners, minlength=self.sampler.num_examples)
        return torch.argsort(owners, stable=True), counts, counts.cumsum(0) - counts

    @property
    def rows(self) -> int:
        """M, the number of users that every draw has room for."""
        return self.sampler.rows

    @property
    def expected_batch_size(self) -> float:
        """The mean number of users in a batch: the constant to divide a sum of gradients by."""
        return self.sampler.expected_batch_size

    def __call__(self, key: Tensor, step: int) -> UserDraw:
        """Draw the users of a step and their records.

        Args:
            key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
            step: the number of the step, at least 0.

        Returns:
            A `UserDraw`. A user without records has no row in its mask.

        Raises:
            ArgumentError: `key` is not a key, or `step` is negative or not an integer.
            BatchOverflowError: more users were drawn than fit, and the sampler does not truncate.
        """
        check_integer("step", step, 0)
        users_key, records_key = random.split(key)
        users, mask, truncated = self.sampler(users_key, step)
        order, counts, starts = self._records
        counts, starts = counts[users], starts[users]
        k, step_key = self.max_records, random.fold_in(records_key, step)
        places = torch.arange(k, device="cpu").expand(len(users), k).clone()
        for row in (mask & (counts > k)).nonzero().squeeze(1).tolist():
            chosen = random.permutation(random.fold_in(step_key, int(users[row])), int(counts[row]))[:k]
            places[row] = chosen.sort().values
        records = (places < counts[:, None]) & mask[:, None]
        indices = torch.where(records, order[(starts[:, None] + places).clamp_(max=len(order) - 1)], 0)
        return UserDraw(indices, records.any(1), records, truncated)
