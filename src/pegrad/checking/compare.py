"""Compare a strategy's answers with the loop's: errors relative to gradients and to the terms they are sums of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.call import Call
from pegrad.checking.loop import Leaves, Loop, row_norms, run, seeded, whole_norms
from pegrad.clipping import Clipping, Flat, Weights, grouping_of
from pegrad.errors import ArgumentError, LossError
from pegrad.per_example import Loss, clipped_grad, per_example_norm, per_example_value_and_grad
from pegrad.strategies import Strategy
from pegrad.trees import PyTree

# The greatest relative error that passes for rounding, by the least precise dtype in which the loss computes.
TOLERANCE = {
    torch.float64: 1e-10,  # half a million roundings: any real fault is many orders above
    torch.float32: 1e-4,  # a thousand roundings, and what the guarantee on the sensitivity allows for
    torch.float16: 8e-3,  # eight roundings: sums over positions and examples are kept in float32
    torch.bfloat16: 6e-2,  # the same
}
_GUARANTEED = 1e-4  # what the guarantee on the sensitivity leaves to the rounding of norms and sums, in any dtype
_SHARE = 1e-3  # a leaf whose gradient is next to nothing is judged by this share of the whole gradient
# What lies within rounding of a kink or a tie may fall to either side, and a gradient is then another.
PERTURBED = 8  # runs at slightly other numbers, before a difference is taken for a fault
FURTHER = 4.0  # how much further from what is wanted than those runs may be what is given
NUDGE = 4  # roundings by which numbers are then other


class Values(NamedTuple):
    """Something for each example, each `(B,)` and in float64: distances between two answers, or sizes of terms."""

    losses: Tensor
    grads: Leaves  # one for each leaf
    norms: Tensor

    def over(self, unit: float) -> "Values":
        """Divide by a number; what is not finite becomes zero."""
        losses, norms, *grads = (torch.nan_to_num(t / unit, 0, 0, 0) for t in (self.losses, self.norms, *self.grads))
        return Values(losses, grads, norms)

    def join(self, other: "Values | None", by: Callable[[Tensor, Tensor], Tensor]) -> "Values":
        """Combine with another, number by number."""
        if other is None:
            return self
        grads = [by(a, b) for a, b in zip(self.grads, other.grads, strict=True)]
        return Values(by(self.losses, other.losses), grads, by(self.norms, other.norms))


class Errors(NamedTuple):
    """Greatest relative errors of one comparison; NaN where none was made."""

    dtype: str
    tolerance: float
    grads: list[float]
    sums: list[float]
    losses: float
    norms: float
    shunned: int = 0
    """How many examples the strategy gave no weight, although their gradient is finite."""

    @property
    def wide_tolerance(self) -> float:
        """What passes for rounding in norms and sums."""
        return max(self.tolerance, _GUARANTEED)

    def within(self) -> bool:
        """Whether all are rounding."""
        return not (
            any(error > self.tolerance for error in (*self.grads, self.losses))
            or any(error > self.wide_tolerance for error in (*self.sums, self.norms))
        )


@dataclass(frozen=True)
class Answers:
    """What a strategy gives, in float64."""

    losses: Tensor  # (B,)
    grads: Leaves  # each (B, ...)
    groups: Tensor  # (2, G, B): norms of each clipping group, asked for by themselves, and beside the sum
    sums: Leaves  # of clipped gradients

    @property
    def norms(self) -> Tensor:
        """Norms over all leaves: `(2, B)`."""
        return self.groups.square().sum(1).sqrt()


@dataclass(frozen=True)
class Subject:
    """A loss, a strategy, and the arguments at which they are compared."""

    loss: Loss
    strategy: Strategy
    params: PyTree
    batch: PyTree
    clipping: Clipping | None = None
    """None: one norm over all leaves, and a bound that some gradients exceed."""

    @classmethod
    def of(
        cls,
        loss: Loss,
        params: PyTree,
        batch: PyTree,
        strategy: Strategy,
        examples: int,
        clipping: Clipping | None = None,
    ) -> "Subject":
        """Take a batch's first examples, once it is known to be one."""
        trees.flatten_params(params)
        if trees.flatten_batch(batch)[2] == 0:
            raise ArgumentError("Expected a batch of at least one example to compare on, got an empty one")
        rows = trees.map(lambda leaf: leaf[:examples].detach(), batch)
        return cls(loss, strategy, trees.map(Tensor.detach, params), rows, clipping)

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype among the parameters'."""
        return max((leaf.dtype for leaf in trees.leaves(self.params)), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(trees.leaves(self.batch)[0])

    def names(self) -> list[str]:
        """Return the path of each leaf, parameters before the batch's."""
        return [f"params{path}" for path in trees.paths(self.params)] + [f"batch{p}" for p in trees.paths(self.batch)]

    def to_float64(self) -> "Subject":
        """Return the same with every floating-point leaf in float64."""

        def wide(leaf: Tensor) -> Tensor:
            return leaf.double() if leaf.is_floating_point() else leaf

        return replace(self, params=trees.map(wide, self.params), batch=trees.map(wide, self.batch))

    def perturbed(self, size: float, seed: int) -> "Subject":
        """Return the same with every parameter changed by about `size` of itself."""
        generator = torch.Generator().manual_seed(seed)
        return replace(self, params=trees.map(lambda leaf: nudged(leaf, size, generator), self.params))

    def loop(self, seed: int = 0) -> Loop:
        """Run the plain loop.

        Raises:
            LossError: the loss changed an argument in place.
        """
        problem = Call.of(self.loss, self.params, self.batch, None).problem
        loop = run(problem.loss, problem.params, problem.batch, seed)
        if loop.changed:
            names = self.names()
            raise LossError(
                f"The loss changes {', '.join(names[i] for i in loop.changed)} in place, so it is not a pure function: "
                "make a new tensor (a = a * b in place of a.mul_(b); an activation with inplace=False)"
            )
        return loop

    def clipping_for(self, norms: Tensor) -> Clipping:
        """Return the clipping, or one that suits gradients of these norms."""
        return self.clipping or Flat(_clip_norm(norms))

    def answers(self, clipping: Clipping | None, rows: slice = slice(None), seed: int = 0) -> Answers:
        """Ask the strategy, with torch's generators started from the seed for each question.

        Args:
            clipping: how the sum is clipped; None: as suits the strategy's own gradients.
            rows: which examples.
            seed: for example b of a batch of one it is `b`, as in the loop.
        """

        def ask(function: Callable[..., Any]) -> Any:
            params, batch = trees.map(torch.clone, self.params), trees.map(lambda leaf: leaf[rows].clone(), self.batch)
            with seeded(seed, trees.leaves(params)[0].device):
                return function(params, batch)

        stacked = ask(per_example_value_and_grad(self.loss, strategy=self.strategy))
        grads = _double(stacked.grads)
        clipping = clipping or self.clipping_for(whole_norms(grads))
        norms = ask(per_example_norm(self.loss, by=clipping, strategy=self.strategy))
        clipped = ask(clipped_grad(self.loss, clip_norm=clipping, strategy=self.strategy))
        both = torch.stack([norms.double(), clipped.norms.double()])
        return Answers(stacked.losses.double(), grads, both.reshape(2, -1, both.shape[-1]), _double(clipped.grads))

    def one_by_one(self, clipping: Clipping) -> Answers:
        """Ask the strategy for each example by itself, the generators started as in the loop."""
        each = [self.answers(clipping, slice(b, b + 1), b) for b in range(self.size)]
        losses, grads, norms, sums = zip(*((a.losses, a.grads, a.groups, a.sums) for a in each), strict=True)
        return Answers(
            torch.cat(losses),
            [torch.cat(column) for column in zip(*grads, strict=True)],
            torch.cat(norms, 2),
            [torch.stack(column).sum(0) for column in zip(*sums, strict=True)],
        )


def nudged(tensor: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Return a floating-point tensor with every number changed by about `size` of itself."""
    by = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    return (tensor.double() * (1 + size * by)).to(tensor.dtype)


def compare(
    subject: Subject, loop: Loop, reference: Loop, terms: Values | None = None, *, alone: bool = False
) -> Errors:
    """Compare a strategy's answers with a reference.

    Args:
        subject: what to ask.
        loop: the plain loop at the subject's arguments, which says what is finite and how precise it can be.
        reference: what the answers should be: `loop`, or the loop in float64.
        terms: how large the terms are that losses, gradients and norms are sums of, as far as known.
        alone: whether to ask for one example at a time.
    """
    clipping = subject.clipping_for(reference.norms[loop.finite])
    answers = subject.one_by_one(clipping) if alone else subject.answers(clipping)
    errors = _errors(subject, answers, reference, clipping, terms, loop)
    if errors.within():
        return errors
    size = NUDGE * torch.finfo(loop.narrowest).eps
    for seed in range(PERTURBED):
        moved = distance_of(subject.perturbed(size, seed).loop(), loop).over(errors.tolerance / FURTHER)
        terms = moved.join(terms, torch.maximum)
    return _errors(subject, answers, reference, clipping, terms, loop)


def compare_random(subject: Subject, loop: Loop) -> Errors:
    """Compare each example by itself with the loop, and norms and sum of several with the strategy's own gradients.

    Args:
        subject: what to ask; its loss draws random numbers.
        loop: the plain loop at the subject's arguments.

    Returns:
        Errors that are NaN where the strategy drew other numbers than the loop: its losses differ.
    """
    alone = compare(subject, loop, loop, alone=True)
    if alone.losses > alone.tolerance:
        nothing = [float("nan")] * len(alone.grads)
        alone = alone._replace(losses=nothing[0], norms=nothing[0], grads=nothing, sums=nothing)
    together = subject.answers(None)
    norms = whole_norms(together.grads)
    own = replace(loop, losses=together.losses, grads=together.grads, finite=norms.isfinite())
    several = _errors(subject, together, own, subject.clipping_for(norms[own.finite]), None, own)
    sums = list(map(worse, alone.sums, several.sums))
    return alone._replace(sums=sums, norms=worse(alone.norms, several.norms))


def _errors(
    subject: Subject, answers: Answers, reference: Loop, clipping: Clipping, terms: Values | None, loop: Loop
) -> Errors:
    """Say how far answers are from a reference, on the examples that are finite in the loop."""
    keep = loop.finite
    given = answers.groups[1]  # beside a sum, a strategy may mistrust a row and leave it out: the norm is infinite
    summed = reference.finite & (keep | given.isfinite()) & ~given.isposinf()
    weighed = summed.all(0)
    unknown = bool((given.isfinite() & ~reference.finite).any())  # half precision overflows in the loop alone
    norms = reference.norms
    grouping = grouping_of(clipping, subject.params)
    groups = _group_norms(reference.grads, grouping.of)
    distance = distance_of(answers, reference)
    sizes = Values(reference.losses.abs(), [row_norms(g) + _SHARE * norms for g in reference.grads], norms)
    sizes = sizes.join(terms, torch.add)
    weights = [
        Weights.of(weighting, squares, rows).values
        for weighting, squares, rows in zip(grouping.weightings, groups.square(), summed, strict=True)
    ]
    sums = []
    for group, found, grad, size in zip(grouping.of, answers.sums, reference.grads, sizes.grads, strict=True):
        rows = summed[group]
        exact = torch.tensordot(weights[group][rows], grad[rows], 1)
        error = _worst(_rows_apart(found[None], exact[None]), (weights[group][rows] @ size[rows])[None])
        sums.append(float("nan") if unknown else error)
    overflown = ~loop.losses.isfinite() & ~answers.losses.isfinite()
    apart = (answers.groups - groups).abs().amax(0)
    spans = groups + _SHARE * norms + (sizes.norms - norms)  # a group that is next to nothing is judged like a leaf
    length = whole_norms([leaf.double()[None] for leaf in trees.leaves(subject.params)])
    return Errors(
        dtype_name(subject.dtype),
        TOLERANCE[loop.narrowest],
        [_worst(d[keep], s[keep]) for d, s in zip(distance.grads, sizes.grads, strict=True)],
        sums,
        # Rounding the parameters alone moves a loss by its gradient times their length.
        _worst(distance.losses.masked_fill(overflown, 0)[keep], (sizes.losses + norms * length)[keep]),
        _worst(
            torch.cat([distance.norms[None], apart])[:, weighed & keep],
            torch.cat([sizes.norms[None], spans])[:, weighed & keep],
        ),
        int((keep & ~weighed).sum()),
    )


def _group_norms(grads: Leaves, of: Sequence[int]) -> Tensor:
    """Norms of each clipping group: `(G, B)`."""
    groups = range(max(of) + 1)
    return torch.stack([whole_norms([g for g, of_it in zip(grads, of, strict=True) if of_it == i]) for i in groups])


def distance_of(a: Answers | Loop, b: Loop) -> Values:
    """Say how far two answers are apart, example by example."""
    grads = [_rows_apart(x, y) for x, y in zip(a.grads, b.grads, strict=True)]
    norms = (a.norms - b.norms).abs()
    equal = (a.losses == b.losses) | a.losses.isnan() & b.losses.isnan()
    return Values((a.losses - b.losses).abs().masked_fill(equal, 0), grads, norms.amax(0) if norms.dim() > 1 else norms)


def _rows_apart(a: Tensor, b: Tensor) -> Tensor:
    """Distances of the rows of two tensors `(B, ...)`; infinite if they differ in shape."""
    return row_norms(a - b) if a.shape == b.shape else b.new_full(b.shape[:1], torch.inf)


def _worst(distance: Tensor, size: Tensor) -> float:
    """Return the greatest ratio; nothing over nothing is 0, what is not a number or not there is infinitely wrong."""
    if distance.numel() == 0:
        return float("inf")
    ratio = torch.where(distance == 0, 0.0, distance / size)
    return float(ratio.masked_fill(ratio.isnan(), torch.inf).max())


def _clip_norm(norms: Tensor) -> float:
    """Find a bound that some norms exceed and some do not; of one alone, half of it."""
    ordered = norms[norms.isfinite() & (norms > 0)].sort().values
    middle = len(ordered) // 2
    bound = float(ordered[middle - 1 : middle + 1].mean() if middle else ordered.sum() / 2)
    return min(max(bound, 1e-9), 1e9)  # what a clip norm may be


def _double(tree: PyTree) -> Leaves:
    return [leaf.double() for leaf in trees.leaves(tree)]


def worse(a: float, b: float) -> float:
    """Return the greater of two errors, where NaN says that there is none."""
    return b if a != a else a if b != b else max(a, b)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as users write it, without `torch`."""
    return str(dtype).removeprefix("torch.")
