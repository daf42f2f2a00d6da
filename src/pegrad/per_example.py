"""What a user calls: per-example gradients, their norms, and their clipped sum, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_scale, check_size
from pegrad.accumulation import FEW, Added, Sums, extended, nothing, total
from pegrad.call import Call
from pegrad.clipping import Clipping, as_clipping, grouping_of
from pegrad.numerics import accumulator
from pegrad.problem import Leaves
from pegrad.reductions.norms import SquaredNorms
from pegrad.reductions.stack import Stack
from pegrad.strategies import Strategy, resolve
from pegrad.strategies.failures import attributed
from pegrad.strategies.paths import ByPath
from pegrad.tracing.eager import eager
from pegrad.trees import PyTree

Loss = Callable[[Any, Any], Any]


class PerExample(NamedTuple):
    """Every example's gradient, and what its forward pass gave."""

    grads: PyTree
    """Like the parameters, each leaf with a leading axis `B`."""
    losses: Tensor
    """`(B,)`"""
    aux: PyTree
    """What the loss returned beside the scalar, each leaf with a leading axis `B`; None if it returned nothing."""


class Clipped(NamedTuple):
    """The sum of clipped gradients, and what the forward pass gave for each example.

    Only `grads` is bounded by the sensitivity; the other fields tell of single examples, without any protection.
    """

    grads: PyTree
    """Like the parameters, in at least float32: the sum of clipped gradients over `normalize_by`."""
    losses: Tensor
    """`(B,)`; 0 for padding."""
    norms: Tensor
    """Before clipping, in at least float32; 0 for padding. `(B,)` where all leaves are clipped together; with clipping
    groups `(G, B)`, a row for each, in the order of `ClippedGrad.groups`."""
    aux: PyTree
    """What the loss returned beside the scalar, each leaf with a leading axis `B`; None if it returned nothing."""
    non_finite: Tensor
    """Number of examples whose gradient was not finite, int64 scalar. They contributed zero: of several clipping
    groups, to those in which it was not."""


def per_example_grad(
    loss: Loss, *, strategy: str | Strategy = "auto", microbatch_size: int | None = None
) -> Callable[..., PyTree]:
    """Make a function that returns the gradient of `loss` for each example of a batch.

    Args:
        loss: `loss(params, example) -> scalar` or `(scalar, aux)`: a pure function of one example, without a batch
            axis.
        strategy: a key of `pegrad.STRATEGIES`, `auto`, or a `Strategy`.
        microbatch_size: examples computed at a time, >= 1; it bounds the memory of the intermediate values. None: all.

    Returns:
        `(params, batch, mask=None) -> grads`: a pytree like `params`, each leaf with a leading axis `B`. `mask`
        `(B,)`, boolean, marks with False the rows that are padding, whose gradient is returned as zero.

    Raises:
        ArgumentError: unknown strategy, or `microbatch_size` below 1.
        LeafError: on a call, a leaf of `params` or `batch` of the wrong type, dtype or leading axis.
        LossError: on a call, the loss is no scalar function of one example.

    >>> import torch
    >>> def loss(params, example):
    ...     x, y = example
    ...     return (params["w"] @ x - y) ** 2
    >>> batch = torch.eye(2), torch.tensor([0.0, 1.0])
    >>> per_example_grad(loss)({"w": torch.ones(2)}, batch)
    {'w': tensor([[2., 0.],
            [0., 0.]])}
    """
    function = per_example_value_and_grad(loss, strategy=strategy, microbatch_size=microbatch_size)

    def grads(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> PyTree:
        return function(params, batch, mask).grads

    return grads


def per_example_value_and_grad(
    loss: Loss, *, strategy: str | Strategy = "auto", microbatch_size: int | None = None
) -> Callable[..., PerExample]:
    """Make a function that returns gradient, loss and aux for each example of a batch.

    Args:
        loss: as for `per_example_grad`.
        strategy: as for `per_example_grad`.
        microbatch_size: as for `per_example_grad`.

    Returns:
        `(params, batch, mask=None) -> PerExample`.

    Raises:
        ArgumentError, LeafError, LossError: as `per_example_grad`.
    """
    chosen = resolve(strategy)
    check_size("microbatch_size", microbatch_size)

    @eager
    def values_and_grads(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> PerExample:
        call = Call.of(loss, params, batch, mask)
        with attributed(chosen, call.problem):
            answers = [ByPath(chosen).reduce(chunk, Stack()) for chunk in call.chunks(microbatch_size)]
        grads, values = zip(*answers, strict=True)
        leaves = [call.rows(parts) for parts in zip(*grads, strict=True)]
        return PerExample(trees.unflatten(call.params, leaves), call.losses(values), call.aux(values))

    return values_and_grads


def per_example_norm(
    loss: Loss,
    *,
    by: Clipping | None = None,
    strategy: str | Strategy = "auto",
    microbatch_size: int | None = None,
) -> Callable[..., Tensor]:
    """Make a function that returns the norm of each example's gradient.

    Args:
        loss: as for `per_example_grad`.
        by: a clipping whose groups of leaves each have a norm of their own, such as `pegrad.clipping.PerLayer(1.0)`;
            nothing is clipped. None: one norm over all leaves together.
        strategy: as for `per_example_grad`.
        microbatch_size: as for `per_example_grad`.

    Returns:
        `(params, batch, mask=None) -> norms`, in at least float32: Euclidean; 0 for padding. `(B,)`, over all leaves
        together, or `(G, B)`, a row for each group, the same as `Clipped.norms`.

    Raises:
        ArgumentError, LeafError, LossError: as `per_example_grad`, and as `clipped_grad` for `by`.
    """
    chosen = resolve(strategy)
    clipping = None if by is None else as_clipping(by)
    check_size("microbatch_size", microbatch_size)

    @eager
    def norms(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Tensor:
        call = Call.of(loss, params, batch, mask)
        grouping = None if clipping is None else grouping_of(clipping, params)
        reduction = SquaredNorms(grouping and grouping.of)
        with attributed(chosen, call.problem):
            answers = [ByPath(chosen).reduce(chunk, reduction)[0] for chunk in call.chunks(microbatch_size)]
        found = _norms(call, [squares for (squares,) in answers])
        return found[0] if grouping is None or grouping.names is None else found

    return norms


def clipped_grad(
    loss: Loss,
    *,
    clip_norm: float | Clipping,
    strategy: str | Strategy = "auto",
    microbatch_size: int | None = None,
    normalize_by: float = 1.0,
) -> "ClippedGrad":
    """Make the function whose value is a batch's sum of clipped per-example gradients.

    Args:
        loss: as for `per_example_grad`.
        clip_norm: bound C on the Euclidean norm of each example's gradient over all leaves, > 0; or a clipping of
            `pegrad.clipping`: by groups of leaves, automatic, by a function of one's own.
        strategy: as for `per_example_grad`.
        microbatch_size: examples whose gradients are computed at a time, >= 1; the sum is accumulated over them, at
            constant memory (1 is Lee et al. 2021, NanoBatch). The result is the same for every value, up to
            rounding. None: all at once.
        normalize_by: public constant to divide the sum by, > 0, such as the expected batch size.

    Returns:
        A pure function `(params, batch, mask=None) -> Clipped` with attribute `sensitivity`.

    Raises:
        ArgumentError: unknown strategy, or a number out of its bounds.
        LeafError, LossError: on a call, as `per_example_grad`, and where the clipping does not fit the parameters.

    Guarantee: see `ClippedGrad`.

    Source: Abadi et al. 2016, Algorithm 1; for others, see the clipping.
    """
    clipping = as_clipping(clip_norm)
    check_scale("normalize_by", normalize_by)
    check_size("microbatch_size", microbatch_size)
    return ClippedGrad(loss, clipping, resolve(strategy), microbatch_size, normalize_by)


@dataclass(frozen=True)
class ClippedGrad:
    """The sum of a batch's clipped gradients, over a public constant. Made by `clipped_grad`.

    Guarantee: for batches that differ by one example, added or removed, the Euclidean distance of the two values of
    `Clipped.grads`, or of `finish`, over all leaves is at most `sensitivity`, up to floating-point rounding; whatever
    the example is, NaN and infinity included. Nothing is divided by the size of the batch, nor by any other function of
    the data. Each group of leaves is bounded by itself, so an example that is not finite in one of them contributes
    zero there, and its clipped gradient elsewhere. Bound to
    `test_neighbouring_batches_differ_by_at_most_the_sensitivity`,
    `test_no_hostile_example_moves_the_sum_further_under_any_clipping` and, for micro-batches that arrive one by one,
    `test_the_cut_of_a_batch_changes_nothing`.
    """

    loss: Loss
    clipping: Clipping
    strategy: Strategy
    microbatch_size: int | None = None
    normalize_by: float = 1.0

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the value: the clipping's own over `normalize_by`."""
        return self.clipping.sensitivity / self.normalize_by

    def groups(self, params: PyTree) -> tuple[str, ...]:
        """Name the clipping groups that the leaves of some parameters fall into.

        Args:
            params: pytree of floating-point tensors.

        Returns:
            A name for each row of norms `(G, B)`: what the leaves of the group have in common, such as
            `params['conv']`, or their label. `("params",)` where all leaves are clipped together.

        Raises:
            ArgumentError, LeafError: the clipping does not fit the parameters.
        """
        trees.flatten_params(params)
        return grouping_of(self.clipping, params).names or ("params",)

    @eager
    def __call__(self, params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Clipped:
        """Evaluate the sum.

        Args:
            params: pytree of floating-point tensors.
            batch: pytree of tensors with one leading axis `B >= 0`.
            mask: `(B,)`, boolean; False marks padding, which contributes exactly zero. None: every row is an example.

        Returns:
            A `Clipped`. For `B = 0` its gradients are exact zeros.

        Raises:
            LeafError: a leaf of `params` or `batch` of the wrong type, dtype or leading axis.
            LossError: the loss is no scalar function of one example.
            ArgumentError, LeafError: the clipping does not fit the parameters.
        """
        call = Call.of(self.loss, params, batch, mask)
        leaves, *values = self._summed(call, params)
        return Clipped(trees.unflatten(call.params, leaves), *values)

    def init(self, params: PyTree) -> Sums:
        """Begin a sum over a batch that arrives micro-batch by micro-batch.

        Raises:
            LeafError: a leaf of `params` is no floating-point tensor.
        """
        return nothing(params)

    @eager
    def add(self, sums: Sums, params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Added:
        """Add one micro-batch's clipped gradients, and return new sums; the old ones stay as they are.

        Of a batch in micro-batches, however it was cut, the sum is that of the whole up to rounding, and has its
        sensitivity. Micro-batches may differ in size.

        Args:
            sums: what `init` or the `add` before returned.
            params: the same for every micro-batch.
            batch: pytree of tensors with one leading axis `B >= 0`.
            mask: as for a whole batch.

        Returns:
            An `Added`: the new sums, and losses, norms and aux of this micro-batch.

        Raises:
            LeafError, LossError: as a call on a whole batch; or the sums are of other parameters.
        """
        call = Call.of(self.loss, params, batch, mask)
        leaves, *values = self._summed(call, params)
        return Added(extended(sums, call.problem.params, leaves, call.size), *values)

    def finish(self, sums: Sums) -> PyTree:
        """Return the sum of all clipped gradients that were added, over `normalize_by`: what `Clipped.grads` is."""
        return total(sums)

    def _summed(self, call: Call, params: PyTree) -> tuple[Leaves, Tensor, Tensor, PyTree, Tensor]:
        """Return the sum for each leaf, and what is beside it in a `Clipped`."""
        grouping = grouping_of(self.clipping, params)
        parts = _Accumulator(call)
        squares, values = [], []
        for chunk in call.chunks(self.microbatch_size):
            with attributed(self.strategy, chunk):
                part, norms, value = ByPath(self.strategy).clipped_sum(chunk, grouping.over(self.normalize_by))
            parts.add(part)
            squares.append(norms)
            values.append(value)
        norms = _norms(call, squares)
        non_finite = call.rows([~torch.isfinite(norms).all(1) for norms in squares]).sum()
        norms = norms[0] if grouping.names is None else norms
        return parts.total(), call.losses(values), norms, call.aux(values), non_finite


class _Accumulator:
    """Adds up the sums of micro-batches: of many of them in float64, for one after another would round."""

    def __init__(self, call: Call) -> None:
        self._dtypes = [call.problem.sum_dtype(leaf) for leaf in call.problem.params]
        self._sums: Leaves = []
        self._added = 0

    def add(self, parts: Leaves) -> None:
        """Add one micro-batch's sums."""
        self._added += 1
        if self._added == FEW:
            self._sums = [leaf.double() for leaf in self._sums]
        self._sums = [a.add_(b) for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts

    def total(self) -> Leaves:
        """Return the whole sums, in the dtype of a sum of so many rows."""
        return [leaf.to(dtype) for leaf, dtype in zip(self._sums, self._dtypes, strict=True)]


def _norms(call: Call, squares: list[Tensor]) -> Tensor:
    """Join the chunks' squared norms `(b, G)`, and take the roots: `(G, B)`, 0 for padding."""
    return call.rows(squares).T.clamp(min=0).sqrt().to(accumulator(call.problem.params[0].dtype))
