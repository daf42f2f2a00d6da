"""Record and replay: the same step on neighbouring batches may differ by one clipped gradient and nothing else."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_positive
from pegrad.adaptive import Bounds
from pegrad.auditing.canaries import Batch, recorded
from pegrad.errors import ArgumentError
from pegrad.trees import PyTree

# What the guarantee of `pegrad.ClippedGrad` leaves to rounding, relative to the sensitivity.
_TOLERANCE = 1e-4


class Replay(NamedTuple):
    """How far one example moved a step."""

    difference: PyTree
    """Released gradients on the batch less those on its neighbour, in float64. As private as the example."""
    distance: float
    """Euclidean norm of `difference` over all leaves."""
    bound: float
    """The sensitivity, and what rounding may add to it."""
    count_distance: float
    """How far the counts of adaptive clipping moved, over their sensitivity, as the next bounds tell; 0 without."""
    repeatable: bool
    """The step on the same batch gave the same bits once more."""
    same_state: bool
    """Both runs went on with the same key and the same counter."""

    @property
    def holds(self) -> bool:
        """Nothing was found: the distances are within their bounds, the bits repeat, the states agree."""
        within = self.distance <= self.bound and self.count_distance <= 1 + _TOLERANCE  # NaN is within no bound
        return within and self.repeatable and self.same_state

    def __repr__(self) -> str:  # without the difference, which is private
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in (*self._fields[1:], "holds"))
        return f"Replay({shown})"


def replay(
    step: Callable[..., Any], params: PyTree, state: Any, batch: Batch, neighbour: Batch, *, sensitivity: float
) -> Replay:
    """Take one step on each of two neighbouring batches with the same key, and compare what they released.

    The noise of both is the same and drops out of the difference, so one run shows what a statistical test would
    need many for. What is left is the clipped gradient of the one example that they do not share; anything more is a
    violation: a divisor that depends on the batch, statistics shared by its examples, noise that depends on data.

    With adaptive clipping the counts are released beside the gradients. The state's next bounds are a function of them,
    so how far they moved is read from there; a bound at the end of its range hides a part of it.

    Args:
        step: `(params, state, batch, mask) -> (params, state, ...)`, such as `pegrad.dp_sgd` makes, with an optimizer
            of `recording`.
        params: the parameters of both.
        state: the state of both.
        batch: a pair `(batch, mask)`; the mask may be None.
        neighbour: the same without one example, as a row less or as a row masked. The other rows keep their order.
        sensitivity: how far one example may move the gradients, > 0: `step.clipped_at(state).sensitivity`.

    Returns:
        A `Replay`; ask it whether the guarantee `holds`. It is one observation: try the worst batches you can think of.

    Raises:
        ArgumentError: `sensitivity` is not above zero, the step does not record, or the state has adaptive bounds and
            the step does not say how they move.
        LeafError, LossError: as `step`.

    Source: record and replay of mechanisms, arXiv 2602.17454.
    """
    check_positive("sensitivity", sensitivity)
    if getattr(state, "bounds", ()) and getattr(step, "adaptive", None) is None:
        raise ArgumentError(
            "Expected a step of pegrad.dp_sgd, since state.bounds are those of adaptive clipping, got one without "
            "step.adaptive: how far the counts moved, which are released beside the gradients, cannot be told"
        )
    states = [step(params, state, *given)[1] for given in (batch, batch, neighbour)]
    bounds = [getattr(after, "bounds", ()) for after in states]
    first, again, other = (trees.leaves(recorded(after)) for after in states)
    differences = [a.double() - b.double() for a, b in zip(first, other, strict=True)]
    rounding = sum(torch.finfo(leaf.dtype).eps * float(leaf.double().norm()) for leaf in (*first, *other))
    return Replay(
        difference=trees.unflatten(trees.flatten(recorded(states[0]))[1], differences),
        distance=_norm(differences),
        bound=sensitivity * (1 + _TOLERANCE) + rounding,
        count_distance=_count_distance(step, bounds[0], bounds[2]),
        repeatable=bounds[0] == bounds[1] and all(_same_bits(a, b) for a, b in zip(first, again, strict=True)),
        same_state=bool(torch.equal(states[0].key, states[2].key)) and states[0].step == states[2].step,
    )


def _count_distance(step: Any, bounds: Bounds, others: Bounds) -> float:
    """Undo `Adaptive.following`: a count moves the logarithm of its bound by the learning rate over the divisor."""
    if not bounds:
        return 0.0
    one_count = step.adaptive.learning_rate / step.clipped_grad.normalize_by
    moved = [math.log(a / b) / one_count for a, b in zip(bounds, others, strict=True)]
    return math.hypot(*moved) / (math.sqrt(len(moved)) / 2)


def _norm(leaves: list[Tensor]) -> float:
    return float(torch.stack([leaf.square().sum() for leaf in leaves]).sum().sqrt())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)))
