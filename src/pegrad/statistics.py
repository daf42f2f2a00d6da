"""Other questions to the same pass: inner products, second moments and the noise scale of per-example gradients.

None of them holds more than one parameter leaf's stacked gradients, and where a rule knows better, not even those;
unless the examples take different paths through the loss, or only the loop can run it: then they are stacked. Under
`auto`, `book_keeping` and `ghost` the answers are constants to any further differentiation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.call import Call
from pegrad.clipping import Grouping, Unclipped
from pegrad.errors import ArgumentError, LeafError
from pegrad.numerics import accumulator
from pegrad.per_example import Loss
from pegrad.problem import Leaves
from pegrad.reductions import moments, products
from pegrad.reductions.base import Reduction
from pegrad.strategies import Strategy, resolve
from pegrad.strategies.failures import attributed
from pegrad.strategies.paths import ByPath
from pegrad.tracing.eager import eager
from pegrad.trees import PyTree


class Moments(NamedTuple):
    """Mean and variance of a batch's per-example gradients, number by number."""

    mean: PyTree
    """Like the parameters."""
    variance: PyTree
    """Like the parameters: unbiased, so NaN for one example."""


def per_example_dot(loss: Loss, *, strategy: str | Strategy = "auto") -> Callable[..., Tensor]:
    """Make a function that returns each example's inner product of its gradient with a direction.

    An operation that is linear in its parameter is run once more with the direction in the parameter's place;
    no gradient is stacked for it.

    Args:
        loss: as for `pegrad.per_example_grad`.
        strategy: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch, direction, mask=None) -> dots`, `(B,)`, 0 for padding; `direction` is a pytree like `params`.

    Raises:
        LeafError, LossError: on a call, as `pegrad.per_example_grad`, or a direction unlike the parameters.
    """
    chosen = resolve(strategy)

    @eager
    def dots(params: PyTree, batch: PyTree, direction: PyTree, mask: Tensor | None = None) -> Tensor:
        call = Call.of(loss, params, batch, mask)
        vectors, spec = trees.flatten(direction)
        shapes = [leaf.shape for leaf in call.problem.params]
        if spec != call.params or [v.shape for v in vectors] != shapes:
            raise LeafError("direction differs from params in structure or shapes: expected a pytree like params")
        vectors = [
            vector.detach().to(accumulator(leaf.dtype))
            for vector, leaf in zip(vectors, call.problem.params, strict=True)
        ]
        (found,) = _ask(chosen, call, products.Dots(vectors))
        return call.rows([found])

    return dots


def gradient_gram(loss: Loss, *, strategy: str | Strategy = "auto") -> Callable[..., Tensor]:
    """Make a function that returns all inner products of a batch's gradients: the empirical neural tangent kernel.

    Args:
        loss: as for `pegrad.per_example_grad`; for the tangent kernel of a scalar network, the network itself.
        strategy: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch, mask=None) -> gram`, `(B, B)`, symmetric, 0 for padding; its diagonal holds the squared norms.

    Raises:
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.

    Source: Jacot, Gabriel & Hongler 2018.
    """
    chosen = resolve(strategy)

    @eager
    def gram(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Tensor:
        call = Call.of(loss, params, batch, mask)
        (found,) = _ask(chosen, call, products.Gram())
        call.check()
        return found[: call.size, : call.size]

    return gram


def gradient_moments(loss: Loss, *, strategy: str | Strategy = "auto") -> Callable[..., Moments]:
    """Make a function that returns mean and variance of a batch's gradients, number by number.

    Args:
        loss: as for `pegrad.per_example_grad`.
        strategy: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch, mask=None) -> Moments`, for a batch of at least one example.

    Raises:
        ArgumentError: on a call with an empty batch.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.
    """
    chosen = resolve(strategy)

    @eager
    def of_batch(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Moments:
        call = _call_of_some(loss, params, batch, mask, least=1)
        found = _ask(chosen, call, moments.Moments())
        call.check()
        leaves = len(call.problem.params)
        return Moments(trees.unflatten(call.params, found[:leaves]), trees.unflatten(call.params, found[leaves:]))

    return of_batch


def gradient_noise_scale(loss: Loss, *, strategy: str | Strategy = "auto") -> Callable[..., Tensor]:
    """Make a function that estimates the batch size at which a gradient is as much signal as noise.

    It is the trace of the gradients' covariance over the squared norm of the true gradient, both estimated without
    bias from norms and sum alone. A batch whose gradients cancel can make the second estimate zero or negative: the
    result is then infinite.

    Args:
        loss: as for `pegrad.per_example_grad`.
        strategy: as for `pegrad.per_example_grad`.

    Returns:
        `(params, batch, mask=None) -> scale`, a scalar in examples, >= 0, for a batch of at least two examples.

    Raises:
        ArgumentError: on a call with fewer than two examples.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.

    Source: McCandlish, Kaplan & Amodei 2018, the "simple" noise scale.
    """
    chosen = resolve(strategy)

    @eager
    def scale(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Tensor:
        call = _call_of_some(loss, params, batch, mask, least=2)
        size = call.examples
        grouping = Grouping.flat(len(call.problem.params), Unclipped())
        with attributed(chosen, call.problem):
            sums, squares, _ = ByPath(chosen).clipped_sum(call.problem, grouping)
        squares = call.rows([squares])
        of_mean = torch.stack([total.square().sum() for total in sums]).sum() / size**2
        covariance = (squares.sum() - size * of_mean) / (size - 1)
        signal = of_mean - covariance / size
        return torch.where(signal > 0, covariance.clamp(min=0) / signal, torch.inf)

    return scale


def _ask(strategy: Strategy, call: Call, reduction: Reduction) -> Leaves:
    with attributed(strategy, call.problem):
        return ByPath(strategy).reduce(call.problem, reduction)[0]


def _call_of_some(loss: Loss, params: PyTree, batch: PyTree, mask: Tensor | None, least: int) -> Call:
    call = Call.of(loss, params, batch, mask)
    if call.examples < least:
        raise ArgumentError(f"Expected a batch of at least {least} examples, got {call.examples}")
    return call
