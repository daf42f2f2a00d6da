"""The private step on many ranks, each with some of the batch's rows and all of the parameters."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import optree
from torch import Tensor
from torch.distributed.tensor import DTensor

from pegrad import random, trees
from pegrad.distributed.agreement import Agreement
from pegrad.distributed.groups import Group, Mesh, group_of
from pegrad.distributed.sharding import Rows, check_elementwise, gather, laid_out, local, rows_of
from pegrad.distributed.shares import Share
from pegrad.distributed.sums import FastSum, Summation
from pegrad.dp_sgd import DPSGD, Release, State, Step
from pegrad.errors import ArgumentError
from pegrad.optim.base import GradientTransformation
from pegrad.per_example import ClippedGrad
from pegrad.random.keys import key_bytes
from pegrad.ranks import ClippedSum
from pegrad.tracing.eager import outermost
from pegrad.trees import PyTree


def data_parallel(
    step: DPSGD, mesh: Mesh = None, *, summation: Summation = FastSum, gathered: PyTree = True
) -> "DataParallel":
    """Make a private step that the ranks of a group take together.

    Args:
        step: of `pegrad.dp_sgd`, made alike on every rank.
        mesh: the ranks: a one-dimensional `DeviceMesh`, a process group, or None for all.
        summation: how the ranks' sums are added up: `FastSum`, or `ExactSum`, whose bits do not depend on the ranks.
        gathered: which sharded parameters are made whole for the step: True, or a prefix pytree of booleans. Of the
            others the loss gets this rank's rows, and uses them by `whole` alone.

    Returns:
        A `DataParallel`, called as the step is, with a share of the draw in place of a mask.

    Raises:
        ArgumentError: no step of `dp_sgd`, or no mesh of one dimension.

    Guarantee: see `DataParallel`.
    """
    if not isinstance(step, DPSGD):
        raise ArgumentError(f"Expected step to be a DPSGD of pegrad.dp_sgd, got {type(step).__name__}")
    return DataParallel(step, group_of(mesh), summation, gathered)


@dataclass(frozen=True)
class DataParallel:
    """A step of differentially private SGD that many ranks take together. Made by `data_parallel`.

    Each rank computes the clipped sum over its own rows. The sums are added up; every rank makes the noise of the whole
    by itself from the shared key, so that it is added once and is never sent; every rank makes the same update.

    Guarantee: that of `DPSGD`, for the batch of all ranks: noise of the stated law is added once, however many ranks
    there are, and one example of one rank moves the sum by at most the sensitivity. Before any sum leaves a rank, the
    ranks check that they agree on the key, the step, parameters, optimizer state and constants, and that their shares
    are the draw, each part of it once. Bound to `test_noise_is_added_once_whatever_the_ranks_are`,
    `test_one_example_moves_the_sum_of_all_ranks_by_at_most_the_sensitivity` and
    `test_what_the_ranks_must_have_in_common_is_checked`.

    A step taken again from one state must be the very same step: after a restart that changes how sums come about
    (other ranks, other micro-batches, other machines), use `ExactSum`, or go on from the last state under another key,
    `random.fold_in(key, restart)`, and account for the steps that were taken twice.

    Source: Abadi et al. 2016, Algorithm 1, with its sum over rows in parts.
    """

    step: DPSGD
    group: Group
    summation: Summation
    gathered: PyTree = True

    def init(self, params: PyTree, key: Tensor) -> State:
        """Return the state before the first step: as `DPSGD.init`, with the same key on every rank.

        Args:
            params: the same on every rank; sharded ones make an optimizer's state sharded.
            key: the run's key.

        Raises:
            ArgumentError, LeafError: as `DPSGD.init`; or parameters are sharded, and the optimizer is not elementwise.
        """
        if any(self._rows_here(params)):
            check_elementwise(GradientTransformation(self.step.init_optimizer, self.step.update), params)
        return self.step.init(params, key)

    def _rows_here(self, params: PyTree) -> list[Rows | None]:
        return [rows_of(leaf, self.group) for leaf in trees.leaves(params)]

    def __call__(self, params: PyTree, state: State, batch: PyTree, share: Share) -> Step:
        """Take one step, this rank with one micro-batch.

        Args:
            params: the same on every rank.
            state: the same on every rank; never for two different batches.
            batch: this rank's rows, those of `share`: pytree of tensors with leading axis `m`.
            share: which rows of the draw they are: the only one that `split` returned.

        Returns:
            New parameters and state, bit for bit the same on every rank, and metrics of this rank's rows.

        Raises:
            AgreementError: on every rank, if the ranks do not take one step together, or one of them failed.
            ArgumentError, LeafError, LossError: as `DPSGD`.
        """
        return self.accumulate(params, state, [(batch, share)])

    @outermost
    def accumulate(self, params: PyTree, state: State, microbatches: Iterable[tuple[PyTree, Share]]) -> Step:
        """Take one step, this rank with several micro-batches, at the memory of one.

        Args:
            params: as for a call.
            state: as for a call.
            microbatches: pairs of rows and their share: all shares that `split` returned on this rank.

        Returns:
            As a call.

        Raises:
            As a call.
        """
        grads, after, metrics = self.release(params, state, microbatches)
        noisy = [grads]
        del grads
        own, whole = local(params), after.optimizer
        updated, after = self.step.updated(own, noisy, after._replace(optimizer=local(whole)))
        after = after._replace(optimizer=laid_out(after.optimizer, whole))
        return Step(laid_out(updated, params), after, metrics)

    @outermost
    def release(self, params: PyTree, state: State, microbatches: Iterable[tuple[PyTree, Share]]) -> Release:
        """Take a step but for the update: see `DPSGD.release`."""
        agreement = Agreement(self.group)
        with agreement.or_none():
            given = _checked(microbatches)
            first = next(given, None)
            if first is None:
                raise ArgumentError("Expected a micro-batch at the least, of padding alone if need be: see split")
            rows = first[1].total * len(first[1].mask)
            kept = self._kept(params)
            together = _Together(self, agreement, self._rows_here(params), kept, params, state, rows)
            leaves, spec = trees.flatten(params)
            usable = [(local if stays else gather)(leaf) for leaf, stays in zip(leaves, kept, strict=True)]
            given = together.follow(chain([first], given))
            return self.step.release_among(together, trees.unflatten(spec, usable), state, given)

    def _kept(self, params: PyTree) -> list[bool]:
        """Tell of each leaf whether only parts of it are there in a step."""
        leaves = trees.leaves(params)
        try:
            gathered = optree.broadcast_prefix(self.gathered, params, namespace=trees.NAMESPACE)
        except ValueError as error:
            raise ArgumentError(
                f"Expected gathered to be a prefix of params, True or False for each part: {error}"
            ) from error
        kept = [isinstance(leaf, DTensor) and not whole for leaf, whole in zip(leaves, gathered, strict=True)]
        if any(kept) and self.summation is not FastSum:
            raise ArgumentError(
                "Expected all parameters gathered where sums are exact: sums of others are added up on their way back"
            )
        return kept


def _checked(microbatches: Iterable[tuple[PyTree, Share]]) -> Iterator[tuple[PyTree, Share]]:
    for number, given in enumerate(microbatches):
        if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], Share):
            raise ArgumentError(
                f"Expected micro-batch {number} to come with a Share of pegrad.distributed.split in place of a mask: "
                "the step must be told which rows of the draw this rank has"
            )
        yield given


@dataclass
class _Together:
    """The ranks of one step: see `pegrad.ranks.Ranks`."""

    parallel: DataParallel
    agreement: Agreement
    rows_here: list[Rows | None]
    kept: list[bool]
    params: PyTree
    state: State
    rows: int
    shares: list[Share] = field(default_factory=list)

    def follow(self, microbatches: Iterable[tuple[PyTree, Share]]) -> Iterator[tuple[int, Any]]:
        """Take note of the shares as they pass."""
        for batch, share in microbatches:
            self.shares.append(share)
            yield share.number, (batch, share.mask)

    def clipped(self, clipped: ClippedGrad) -> ClippedSum:
        return self.parallel.summation(clipped, self.rows, self.send)

    def send(self, leaf: int, own: Tensor) -> Tensor:
        if not leaf:
            self.agreement.reach(self.common(), self.shares)
        if self.kept[leaf]:
            return own  # `whole` has added it up
        rows, group = self.rows_here[leaf], self.parallel.group
        return group.sum_(own) if rows is None else rows.scatter_sum(group, own)

    def total(self, counts: Tensor) -> Tensor:
        return self.parallel.group.sum_(counts)

    def each_normal(self, key: Tensor, leaves: list[Tensor]) -> Iterator[Tensor]:
        return random.each_normal(key, leaves, [rows and rows.flat for rows in self.rows_here])

    def common(self) -> dict[str, Any]:
        """Name what must be the same on every rank."""
        step = self.parallel.step
        clipped = step.clipped_grad
        return {
            "key": key_bytes(self.state.key),
            "number of the step": self.state.step,
            "parameters": self.params,
            "state of the optimizer": self.state.optimizer,
            "clip norm": (clipped.clipping, self.state.bounds, step.adaptive),
            "noise multiplier": (step.noise_multiplier, step.gradient_noise_multiplier),
            "expected batch size": clipped.normalize_by,
            "sampler": step.sampler,
            "micro-batch size": (clipped.microbatch_size, sorted({len(share.mask) for share in self.shares})),
            "summation": (self.parallel.summation, self.kept),
        }
