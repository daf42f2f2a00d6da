"""Other questions to the same pass: inner products, second moments and the noise scale of per-example gradients.

None of them holds more than one parameter leaf's stacked gradients, and where a rule knows better, not even those;
unless the examples take different paths through the loss, or only the loop can run it: then those of a micro-batch are
stacked. Under `auto`, `book_keeping` and `ghost` the answers are constants to any further differentiation.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_size
from pegrad.assumptions import decided
from pegrad.call import Call
from pegrad.clipping import Grouping, Unclipped
from pegrad.errors import ArgumentError, LeafError
from pegrad.numerics import accumulator, squared_norms, zero_rows
from pegrad.per_example import Loss
from pegrad.problem import Leaves, Problem
from pegrad.reductions import moments, products
from pegrad.reductions.base import Reduction
from pegrad.reductions.moments import Scatter
from pegrad.strategies import Strategy, resolve
from pegrad.strategies.failures import attributed
from pegrad.strategies.paths import ByPath
from pegrad.tracing.eager import eager
from pegrad.trees import PyTree


class Moments(NamedTuple):
    """Mean and variance of a batch's per-example gradients, number by number."""

    mean: PyTree
    """Like the parameters, in at least float32."""
    variance: PyTree
    """Like the mean: unbiased, so NaN for one example."""


class NoiseScale(NamedTuple):
    """How much of a gradient is noise: the batch size at which it is half, and the two numbers whose ratio that is.

    The ratio is not unbiased, its two terms are: over several batches average those, and divide the averages.
    """

    scale: Tensor
    """`trace / squared_norm`, in examples, float64 scalar >= 0; infinite where the latter is not above zero."""
    trace: Tensor
    """Of the covariance of the examples' gradients: an unbiased estimate, float64 scalar >= 0."""
    squared_norm: Tensor
    """Of the true gradient: an unbiased estimate, float64 scalar; negative where a batch's gradients cancel."""


def per_example_dot(
    loss: Loss, *, strategy: str | Strategy = "auto", microbatch_size: int | None = None
) -> Callable[..., Tensor]:
    """Make a function that returns each example's inner product of its gradient with a direction.

    An operation that is linear in its parameter is run once more with the direction in the parameter's place;
    no gradient is stacked for it.

    Args:
        loss: as for `pegrad.per_example_grad`.
        strategy: as for `pegrad.per_example_grad`.
        microbatch_size: examples computed at a time, >= 1. None: all.

    Returns:
        `(params, batch, direction, mask=None) -> dots`, `(B,)`, in at least float32, 0 for padding; `direction` is a
        pytree like `params`.

    Raises:
        ArgumentError: unknown strategy, or `microbatch_size` below 1.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`, or a direction unlike the parameters.
    """
    chosen = resolve(strategy)
    check_size("microbatch_size", microbatch_size)

    @eager
    def dots(params: PyTree, batch: PyTree, direction: PyTree, mask: Tensor | None = None) -> Tensor:
        call = Call.of(loss, params, batch, mask)
        reduction = products.Dots(_direction(call, params, direction))
        return call.rows([_ask(chosen, chunk, reduction)[0] for chunk in call.chunks(microbatch_size)])

    return dots


def gradient_gram(
    loss: Loss, *, strategy: str | Strategy = "auto", microbatch_size: int | None = None
) -> Callable[..., Tensor]:
    """Make a function that returns all inner products of a batch's gradients: the empirical neural tangent kernel.

    Args:
        loss: as for `pegrad.per_example_grad`; for the tangent kernel of a scalar network, the network itself.
        strategy: as for `pegrad.per_example_grad`.
        microbatch_size: m >= 1: examples of either side computed at a time, so that no more than 2m are in memory. Each
            pair of micro-batches is a pass of its own, in which a loss that draws random numbers draws others. None:
            all at once.

    Returns:
        `(params, batch, other=None, *, mask=None, other_mask=None) -> gram`, in at least float32. Of one batch:
        `(B, B)`, symmetric, its diagonal the squared norms. Of two, whose leaves differ in nothing but the number of
        examples: `(B, B')`, the gradients of the one with those of the other. 0 for padding.

    Raises:
        ArgumentError: unknown strategy, or `microbatch_size` below 1.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`, or another batch unlike the first.

    Source: Jacot, Gabriel & Hongler 2018.

    >>> import torch
    >>> def loss(params, x):
    ...     return params @ x
    >>> gradient_gram(loss)(torch.ones(2), torch.eye(2), torch.tensor([[2.0, 3.0]]))
    tensor([[2.],
            [3.]])
    """
    chosen = resolve(strategy)
    check_size("microbatch_size", microbatch_size)

    @eager
    def gram(
        params: PyTree,
        batch: PyTree,
        other: PyTree = None,
        *,
        mask: Tensor | None = None,
        other_mask: Tensor | None = None,
    ) -> Tensor:
        call = Call.of(loss, params, batch, mask)
        parts = list(call.chunks(microbatch_size))
        if other is None:
            if other_mask is not None:
                raise ArgumentError("Expected other_mask to be None without another batch: pass other, or mask")
            found = _symmetric(chosen, parts)
        else:
            second = Call.of(loss, params, other, other_mask)
            _check_alike(batch, other)
            found = _blocks([[_between(chosen, a, b) for b in second.chunks(microbatch_size)] for a in parts])
            found = found[:, : second.size]
        call.check()
        return found[: call.size, : call.size if other is None else None]

    return gram


def gradient_moments(
    loss: Loss, *, strategy: str | Strategy = "auto", microbatch_size: int | None = None
) -> Callable[..., Moments]:
    """Make a function that returns mean and variance of a batch's gradients, number by number.

    Those of micro-batches are joined by Chan et al.'s formula, in float64 over more than 256 examples.

    Args:
        loss: as for `pegrad.per_example_grad`.
        strategy: as for `pegrad.per_example_grad`.
        microbatch_size: examples computed at a time, >= 1. None: all.

    Returns:
        `(params, batch, mask=None) -> Moments`, for a batch of at least one example.

    Raises:
        ArgumentError: unknown strategy, or `microbatch_size` below 1; on a call, an empty batch.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.

    Source: Chan, Golub & LeVeque 1983.
    """
    chosen = resolve(strategy)
    check_size("microbatch_size", microbatch_size)

    @eager
    def of_batch(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Moments:
        call = _call_of_some(loss, params, batch, mask, least=1)
        leaves = len(call.problem.params)

        def scatter(chunk: Problem) -> Scatter:
            found = _ask(chosen, chunk, moments.Moments())
            return Scatter(chunk.examples, found[:leaves], found[leaves:])

        found = _joined(call, microbatch_size, scatter, lambda between: [mean.square() for mean in between])
        freedom = torch.as_tensor(found.examples - 1)
        freedom = torch.where(freedom == 0, torch.nan, freedom.double())
        dtypes = [accumulator(leaf.dtype) for leaf in call.problem.params]
        means = [mean.to(dtype) for mean, dtype in zip(found.means, dtypes, strict=True)]
        variances = [(square / freedom).to(dtype) for square, dtype in zip(found.scatters, dtypes, strict=True)]
        return Moments(trees.unflatten(call.params, means), trees.unflatten(call.params, variances))

    return of_batch


def gradient_noise_scale(
    loss: Loss, *, strategy: str | Strategy = "auto", microbatch_size: int | None = None
) -> Callable[..., NoiseScale]:
    """Make a function that estimates the batch size at which a gradient is as much signal as noise.

    It is the trace of the gradients' covariance over the squared norm of the true gradient, both estimated without
    bias from norms and sums alone.

    Args:
        loss: as for `pegrad.per_example_grad`.
        strategy: as for `pegrad.per_example_grad`.
        microbatch_size: examples computed at a time, >= 1. None: all.

    Returns:
        `(params, batch, mask=None) -> NoiseScale`, for a batch of at least two examples. NaN where a gradient is not
        finite.

    Raises:
        ArgumentError: unknown strategy, or `microbatch_size` below 1; on a call, fewer than two examples.
        LeafError, LossError: on a call, as `pegrad.per_example_grad`.

    Source: McCandlish, Kaplan & Amodei 2018, the "simple" noise scale; appendix A.1, with batches of one and of all.
    """
    chosen = resolve(strategy)
    check_size("microbatch_size", microbatch_size)

    @eager
    def scale(params: PyTree, batch: PyTree, mask: Tensor | None = None) -> NoiseScale:
        call = _call_of_some(loss, params, batch, mask, least=2)
        grouping = Grouping.flat(len(call.problem.params), Unclipped())

        def scatter(chunk: Problem) -> Scatter:
            with attributed(chosen, chunk):
                sums, squares, _ = ByPath(chosen).clipped_sum(chunk, grouping)
            means = [total / chunk.examples for total in sums]
            squares = squares if chunk.mask is None else zero_rows(squares, ~chunk.mask)
            return Scatter(chunk.examples, means, [(squares.sum() - chunk.examples * _square(means)).clamp(min=0)])

        found = _joined(call, microbatch_size, scatter, lambda between: [_square(between)])
        trace = found.scatters[0] / (found.examples - 1)
        signal = _square(found.means) - trace / found.examples
        return NoiseScale(torch.where(signal <= 0, torch.inf, trace / signal), trace, signal)

    return scale


def _ask(strategy: Strategy, problem: Problem, reduction: Reduction) -> Leaves:
    with attributed(strategy, problem):
        return ByPath(strategy).reduce(problem, reduction)[0]


def _symmetric(strategy: Strategy, parts: list[Problem]) -> Tensor:
    """Return the inner products of the gradients of a batch, given in parts, with each other."""
    rows: list[list[Tensor]] = []
    for i, part in enumerate(parts):
        (own,) = _ask(strategy, part, products.Gram())
        left = [_between(strategy, part, before) for before in parts[:i]]
        for row, block in zip(rows, left, strict=True):
            row.append(block.T)
        rows.append([*left, own])
    return _blocks(rows)


def _between(strategy: Strategy, a: Problem, b: Problem) -> Tensor:
    """Return the inner products of the gradients of one batch, `(A,)`, with those of another, `(B,)`: `(A, B)`."""
    mask = None
    if a.mask is not None or b.mask is not None:
        mask = torch.cat(
            [p.batch[0].new_ones(p.batch_size, dtype=torch.bool) if p.mask is None else p.mask for p in (a, b)]
        )
    batch = [torch.cat(leaves) for leaves in zip(a.batch, b.batch, strict=True)]
    both = replace(a, batch=batch, mask=mask, whole=a.batch_size + b.batch_size)
    return _ask(strategy, both, products.Gram(a.batch_size))[0]


def _blocks(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, 1) for row in rows])


def _joined(
    call: Call,
    size: int | None,
    scatter: Callable[[Problem], Scatter],
    squares: Callable[[Leaves], Leaves],
) -> Scatter:
    """Join the scatters of a call's micro-batches, leaving out those that are all padding."""
    found: Scatter | None = None
    for chunk in call.chunks(size):
        if chunk.mask is None or decided(chunk.mask.any()):
            part = scatter(chunk)
            found = part if found is None else found.joined(part, squares)
    call.check()
    assert found is not None, "there is an example"
    return found


def _square(leaves: Leaves) -> Tensor:
    """Square the norm over all leaves: a float64 scalar."""
    return torch.stack([squared_norms(leaf[None]).squeeze(0) for leaf in leaves]).sum()


def _direction(call: Call, params: PyTree, direction: PyTree) -> Leaves:
    """Check and flatten a direction, in at least float32."""
    vectors, spec = trees.flatten(direction)
    if spec != call.params:
        raise LeafError("direction differs from params in structure: expected a pytree like params")
    for i, (vector, leaf) in enumerate(zip(vectors, call.problem.params, strict=True)):
        if not isinstance(vector, Tensor) or vector.shape != leaf.shape:
            given = (
                f"has shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else f"is a {type(vector).__name__}"
            )
            raise LeafError(
                f"direction{trees.path(params, i)} {given}: expected a tensor of shape {tuple(leaf.shape)}, like params"
            )
    pairs = zip(vectors, call.problem.params, strict=True)
    return [vector.detach().to(accumulator(leaf.dtype)) for vector, leaf in pairs]


def _check_alike(batch: PyTree, other: PyTree) -> None:
    """Raise `LeafError` unless the examples of two batches can be put into one."""
    (leaves, structure), (others, other_structure) = trees.flatten(batch), trees.flatten(other)
    if structure != other_structure:
        raise LeafError(
            "other differs from batch in structure: expected a pytree like batch. A mask is a keyword, mask="
        )
    for i, (a, b) in enumerate(zip(leaves, others, strict=True)):
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise LeafError(
                f"other{trees.path(other, i)} has examples of shape {tuple(b.shape[1:])} and dtype {b.dtype}, but "
                f"batch has examples of shape {tuple(a.shape[1:])} and dtype {a.dtype}: pad or convert them"
            )


def _call_of_some(loss: Loss, params: PyTree, batch: PyTree, mask: Tensor | None, least: int) -> Call:
    call = Call.of(loss, params, batch, mask)
    examples = call.size if call.problem.mask is None else call.problem.examples
    if examples < least if isinstance(examples, int) else decided(examples < least):
        raise ArgumentError(f"Expected a batch of at least {least} examples, got {int(examples)}")
    return call
