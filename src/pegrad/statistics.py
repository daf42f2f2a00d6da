"""Other questions to the same pass: inner products, second moments and the noise scale of per-example gradients.

None of them ever holds more than one parameter leaf's stacked gradients, and where a rule knows better, not even
those. The answers are constants to any further differentiation.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.call import Call
from pegrad.clipping import Unclipped
from pegrad.errors import ArgumentError, LeafError
from pegrad.numerics import accumulator, widen
from pegrad.per_example import Loss
from pegrad.plan.uses import ParameterUses
from pegrad.reductions.leaves import LeafAccumulator, stack_rows
from pegrad.reductions.stack import StackedGradients
from pegrad.strategies import BookKeeping
from pegrad.strategies.failures import attributed
from pegrad.tracing.eager import eager
from pegrad.tracing.trace import Tapped, Trace
from pegrad.trees import PyTree


class Moments(NamedTuple):
    """Mean and variance of a batch's per-example gradients, number by number."""

    mean: PyTree
    """Like the parameters."""
    variance: PyTree
    """Like the parameters: unbiased, so NaN for one example."""


def per_example_dot(loss: Loss) -> Callable[..., Tensor]:
    """Make a function that returns each example's inner product of its gradient with a direction.

    An operation that is linear in its parameter is run once more with the direction in the parameter's place;
    no gradient is stacked for it.

    Args:
        loss: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch, direction) -> dots`, `(B,)`; `direction` is a pytree like `params`.

    Raises:
        LeafError, LossError: on a call, as `pegrad.per_example_grad`, or a direction unlike the parameters.
    """

    @eager
    def dots(params: PyTree, batch: PyTree, direction: PyTree) -> Tensor:
        call = Call.of(loss, params, batch, None)
        vectors, spec = trees.flatten(direction)
        shapes = [leaf.shape for leaf in call.problem.params]
        if spec != call.params or [v.shape for v in vectors] != shapes:
            raise LeafError("direction differs from params in structure or shapes: expected a pytree like params")
        vectors = [
            vector.detach().to(accumulator(leaf.dtype))
            for vector, leaf in zip(vectors, call.problem.params, strict=True)
        ]
        strategy = BookKeeping()
        with attributed(strategy, call.problem):
            _, found = strategy.run(call.problem, partial(_Dots, vectors=vectors))
        return call.rows([found.total])

    return dots


def gradient_gram(loss: Loss) -> Callable[..., Tensor]:
    """Make a function that returns all inner products of a batch's gradients: the empirical neural tangent kernel.

    Args:
        loss: as for `pegrad.per_example_grad`; for the tangent kernel of a scalar network, the network itself.

    Returns:
        `(params, batch) -> gram`, `(B, B)`, symmetric; its diagonal holds the squared norms.

    Raises:
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.

    Source: Jacot, Gabriel & Hongler 2018.
    """

    @eager
    def gram(params: PyTree, batch: PyTree) -> Tensor:
        call = Call.of(loss, params, batch, None)
        strategy = BookKeeping()
        with attributed(strategy, call.problem):
            _, found = strategy.run(call.problem, _Gram)
        call.check()
        return found.total[: call.size, : call.size]

    return gram


def gradient_moments(loss: Loss) -> Callable[..., Moments]:
    """Make a function that returns mean and variance of a batch's gradients, number by number.

    Args:
        loss: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch) -> Moments`, for a batch of at least one example.

    Raises:
        ArgumentError: on a call with an empty batch.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.
    """

    @eager
    def moments(params: PyTree, batch: PyTree) -> Moments:
        call = _call_of_some(loss, params, batch, least=1)
        zeros = [torch.zeros_like(leaf).detach() for leaf in call.problem.params]
        mean, variance = list(zeros), list(zeros)

        def visit(leaf: int, rows: Tensor) -> None:
            mean[leaf] = rows.mean(0)
            variance[leaf] = (rows - mean[leaf]).square().sum(0) / (len(rows) - 1 or float("nan"))

        strategy = BookKeeping()
        with attributed(strategy, call.problem):
            strategy.run(call.problem, partial(StackedGradients, visit=visit))
        call.check()
        return Moments(trees.unflatten(call.params, mean), trees.unflatten(call.params, variance))

    return moments


def gradient_noise_scale(loss: Loss) -> Callable[..., Tensor]:
    """Make a function that estimates the batch size at which a gradient is as much signal as noise.

    It is the trace of the gradients' covariance over the squared norm of the true gradient, both estimated without
    bias from norms and sum alone. A batch whose gradients cancel can make the second estimate zero or negative: the
    result is then infinite.

    Args:
        loss: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch) -> scale`, a scalar in examples, >= 0, for a batch of at least two examples.

    Raises:
        ArgumentError: on a call with fewer than two examples.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.

    Source: McCandlish, Kaplan & Amodei 2018, the "simple" noise scale.
    """

    @eager
    def scale(params: PyTree, batch: PyTree) -> Tensor:
        call = _call_of_some(loss, params, batch, least=2)
        size = call.size
        strategy = BookKeeping()
        with attributed(strategy, call.problem):
            sums, squares, _ = strategy.weighted_sum(call.problem, Unclipped())
        call.check()
        of_mean = torch.stack([total.square().sum() for total in sums]).sum() / size**2
        covariance = (squares.sum() - size * of_mean) / (size - 1)
        signal = of_mean - covariance / size
        return torch.where(signal > 0, covariance.clamp(min=0) / signal, torch.inf)

    return scale


class _Dots:
    """Adds up inner products with one vector for each leaf."""

    def __init__(self, trace: Trace, vectors: list[Tensor]) -> None:
        self._trace = trace
        self._vectors = vectors
        self._of_source = {id(leaf): vector for leaf, vector in zip(trace.params, vectors, strict=True)}
        self._leaves = LeafAccumulator(trace, ParameterUses.of(trace))
        self.total = torch.zeros_like(trace.losses).detach()

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            vector = self._of_source.get(id(site.source))
            y = None if vector is None else site.apply(x, vector)
            if y is None:
                self._add(self._leaves.add(site.source, stack_rows(site, x, g)))
            else:
                self.total = self.total + (y * g).reshape(len(self.total), -1).sum(1)

    def receive_copies(self, grads: list[Tensor]) -> None:
        for copies, grad in zip(self._trace.copies, grads, strict=True):
            self._add(self._leaves.add(copies.source, grad))
        self._add(self._leaves.rest())

    def _add(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for leaf, rows in complete:
            self.total = self.total + rows.reshape(len(rows), -1) @ self._vectors[leaf].flatten()


class _Gram:
    """Adds up the Gram matrices of the leaves' gradients."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._uses = ParameterUses.of(trace)
        self._leaves = LeafAccumulator(trace, self._uses)
        batch = len(trace.losses)
        self.total = trace.losses.new_zeros(batch, batch).detach()

    def receive(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        x, g = widen(x), widen(g)
        for site in tapped.sites:
            pairs = site.pairs(x, g) if self._uses.alone(site.source) else None
            if pairs is None:
                self._add(self._leaves.add(site.source, stack_rows(site, x, g)))
            else:
                self.total = self.total + pairs

    def receive_copies(self, grads: list[Tensor]) -> None:
        for copies, grad in zip(self._trace.copies, grads, strict=True):
            self._add(self._leaves.add(copies.source, grad))
        self._add(self._leaves.rest())

    def _add(self, complete: Iterator[tuple[int, Tensor]]) -> None:
        for _, rows in complete:
            flat = widen(rows).reshape(len(rows), -1)
            self.total = self.total + flat @ flat.T


def _call_of_some(loss: Loss, params: PyTree, batch: PyTree, least: int) -> Call:
    call = Call.of(loss, params, batch, None)
    if call.size < least:
        raise ArgumentError(f"Expected a batch of at least {least} examples, got {call.size}")
    return call
