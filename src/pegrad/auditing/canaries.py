"""Canaries scored while a run trains: what each step released, against the gradient of each canary."""

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_positive
from pegrad.auditing.bounds import check_test
from pegrad.auditing.guesses import OneRun, check_included, one_run
from pegrad.errors import ArgumentError, LeafError
from pegrad.optim import GradientTransformation
from pegrad.optim.base import as_transformation
from pegrad.per_example import Loss, per_example_norm
from pegrad.statistics import per_example_dot
from pegrad.trees import PyTree

Batch = tuple[PyTree, Tensor | None]
Score = Callable[[PyTree, PyTree, PyTree], Tensor]


class Recorded(NamedTuple):
    """The state of a recording optimizer."""

    grads: PyTree
    """The gradients of the last update, noise and all: what the step released. Zeros before the first."""
    inner: Any
    """The state of the optimizer itself."""


def recording(optimizer: Any) -> GradientTransformation:
    """Make an optimizer that keeps the gradients it was given, so that an audit can see what each step released.

    Args:
        optimizer: as for `pegrad.dp_sgd`.

    Returns:
        A pair `(init, update)` whose updates are those of `optimizer` and whose state is a `Recorded`.

    Raises:
        ArgumentError: `optimizer` has no `init` and `update`.
    """
    pair = as_transformation(optimizer)

    def init(params: PyTree) -> Recorded:
        return Recorded(trees.map(torch.zeros_like, params), pair.init(params))

    def update(grads: PyTree, state: Recorded, params: PyTree) -> tuple[PyTree, Recorded]:
        kept = trees.map(torch.clone, grads)  # an optimizer may write over what it is given
        updates, inner = pair.update(grads, state.inner, params)
        return updates, Recorded(kept, inner)

    return GradientTransformation(init, update)


def recorded(state: Any) -> PyTree:
    """Return the gradients that the step before `state` released.

    Raises:
        ArgumentError: the optimizer of the step does not record.
    """
    kept = getattr(state, "optimizer", None)
    if not isinstance(kept, Recorded):
        raise ArgumentError(
            f"Expected state.optimizer to be a Recorded, got {type(kept).__name__}: make the step with "
            "pegrad.auditing.recording(optimizer)"
        )
    return kept.grads


def score(loss: Loss, *, clip_norm: float | None = None) -> Score:
    """Make the function that scores canaries by what one step released.

    Args:
        loss: as for `pegrad.per_example_grad`.
        clip_norm: bound C that the canaries' gradients are clipped to first, > 0. None: they are not clipped.

    Returns:
        `(params, canaries, released) -> scores`, `(m,)`: the inner product of each canary's gradient at `params` with
        `released`, a pytree like `params`. `canaries` is a pytree of tensors with a leading axis `m`.

    Raises:
        ArgumentError: `clip_norm` is not a number above zero.
        LeafError, LossError: on a call, as `pegrad.per_example_dot`.

    Source: Steinke, Nasr & Jagielski 2023, arXiv 2305.08846 (auditing DP-SGD from its gradients).
    """
    if clip_norm is not None:
        if not isinstance(clip_norm, Real):
            raise ArgumentError(
                f"Expected clip_norm to be a number or None, got {type(clip_norm).__name__}: canaries are clipped by "
                "the norm over all leaves, or not at all"
            )
        check_positive("clip_norm", clip_norm)
    dots, norms = per_example_dot(loss), per_example_norm(loss)

    def scores(params: PyTree, canaries: PyTree, released: PyTree) -> Tensor:
        if trees.flatten(released)[1] != trees.flatten(params)[1]:
            raise LeafError("released differs from params in structure: expected a pytree like params")
        # A sum is in at least float32, and wider than the parameters where it has many terms.
        direction = trees.map(lambda p, r: r.to(torch.promote_types(p.dtype, torch.float32)), params, released)
        found = dots(params, canaries, direction)
        return found if clip_norm is None else found / (norms(params, canaries) / clip_norm).clamp(min=1)

    return scores


def observe(
    step: Callable[..., Any], params: PyTree, state: Any, batches: Iterable[Batch], canaries: PyTree, score: Score
) -> Tensor:
    """Train, and score the canaries at every step by the gradients that it released.

    Args:
        step: `(params, state, batch, mask) -> (params, state, ...)`, such as `pegrad.dp_sgd` makes, with an optimizer
            of `recording`.
        params: the parameters before the first step.
        state: the state before the first step.
        batches: a pair `(batch, mask)` for each of the T steps; the mask may be None.
        canaries: pytree of tensors with a leading axis `m`: those in the data set and those left out.
        score: `(params, canaries, released) -> (m,)`, of the parameters before the step.

    Returns:
        `(T, m)`.

    Raises:
        ArgumentError: there is no batch, or the step does not record.
        LeafError, LossError: as `step` and `score`.
    """
    rows = []
    for batch, mask in batches:
        before = params
        params, state, *_ = step(params, state, batch, mask)
        rows.append(score(before, canaries, recorded(state)))
    if not rows:
        raise ArgumentError("Expected at least one batch, got none")
    return torch.stack(rows)


def level(scores: Tensor) -> Tensor:
    """Sum the scores `(T, m)` over the steps: `(m,)`. It finds canaries whose gradients show through the noise."""
    return scores.sum(0)


def change(scores: Tensor) -> Tensor:
    """Sum the squared differences of the scores `(T, m)` from one step to the next: `(m,)`.

    Noise that two steps share is gone from a difference; what is left are the canaries that only one of them drew.
    What moves all scores of a step alike, such as the size of its batch, is taken out by their median.
    """
    return (scores - scores.median(1, keepdim=True).values).diff(dim=0).square().sum(0)


def audit(
    step: Callable[..., Any],
    params: PyTree,
    state: Any,
    batches: Iterable[Batch],
    *,
    canaries: PyTree,
    included: Tensor,
    score: Score,
    delta: float,
    confidence: float = 0.95,
) -> OneRun:
    """Audit one run: train, score the canaries, and bound ε from below.

    Two statistics are tested, `level` and, for more than one step, `change`, each at half of `1 - confidence`.

    Args:
        step: as for `observe`.
        params: as for `observe`.
        state: as for `observe`.
        batches: as for `observe`. They are drawn from a data set that holds the canaries that `included` marks, lacks
            the others, and may hold any other examples.
        canaries: pytree of tensors with a leading axis `m`. The more their gradients point in directions of their own,
            the more the audit sees.
        included: `(m,)`, boolean, of `coins`.
        score: of `score`.
        delta: δ in [0, 1).
        confidence: in (0, 1).

    Returns:
        A `OneRun`. A bound above the ε that the accountant states means that the step does not do what was accounted.

    Raises:
        ArgumentError: a number out of its bounds, no batch, or a step that does not record.
        LeafError, LossError: as `step` and `score`.
        MissingExtraError: scipy is not installed.

    Guarantee: for a run that is (ε, δ)-DP for adding or removing one example, `epsilon` is at most ε with probability
    at least `confidence`. Bound to `test_a_correct_step_passes`, `test_every_planted_bug_is_flagged`.

    Source: Steinke, Nasr & Jagielski 2023, arXiv 2305.08846.
    """
    check_test(delta, confidence)
    check_included(included, trees.flatten_batch(canaries)[2])
    scores = observe(step, params, state, batches, canaries, score)
    statistics = [level] if len(scores) == 1 else [level, change]
    share = 1 - (1 - confidence) / len(statistics)
    found = [one_run(statistic(scores), included, delta=delta, confidence=share) for statistic in statistics]
    return max(found, key=lambda answer: answer.epsilon)
