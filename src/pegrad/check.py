"""Compare a strategy with the plain loop on a few examples: what to run before a new model is trusted."""

from math import isnan

import torch

from pegrad import trees
from pegrad._validate import check_size
from pegrad.checking.compare import Errors, Subject, compare, compare_random, distance_of, dtype_name, worse
from pegrad.checking.loop import Loop
from pegrad.checking.report import CheckReport, LeafCheck
from pegrad.clipping import Clipping, as_clipping
from pegrad.errors import CheckError
from pegrad.per_example import Loss
from pegrad.strategies import Strategy, resolve
from pegrad.tracing.eager import eager
from pegrad.tracing.loss import independent
from pegrad.trees import PyTree


@eager
def check(
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    *,
    clip_norm: float | Clipping | None = None,
    strategy: str | Strategy = "auto",
    examples: int = 4,
) -> CheckReport:
    """Compare a strategy with a loop of `torch.autograd.grad`, one example at a time, on a batch's first examples.

    Losses, stacked gradients, norms, and a clipped sum with some examples clipped and some not are compared in
    float64 and in the parameters' own dtype. An error is relative to the gradient and to the terms that the gradient
    is a sum of, which the loop's own rounding tells, so that ordinary cancellation raises no alarm.

    A loss that draws from torch's generators is compared one example at a time, from equal seeds, and several
    examples' norms and sum with the strategy's own stacked gradients. The generators are left as they were.

    Args:
        loss: as for `pegrad.per_example_grad`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors with one leading axis `B >= 1`.
        clip_norm: as for `pegrad.clipped_grad`: the sum is clipped so, and the norms of its groups are compared. None:
            a bound on the norm over all leaves that some of the examples exceed and some do not.
        strategy: as for `pegrad.per_example_grad`.
        examples: how many rows of the batch to compare, >= 1. Each goes at least twice through the loop.

    Returns:
        A `CheckReport`, leaf by leaf, which prints as a table. Its notes say what could not be compared.

    Raises:
        CheckError: a difference beyond rounding; a loss that differs from run to run; or nothing to compare, because no
            gradient is finite. The report, where there is one, is the error's `report`.
        ArgumentError: an empty batch, `examples` below 1, an unknown strategy, or as `pegrad.clipped_grad`.
        LossError: the loss depends on no leaf of `params`, or changes an argument in place; or as
            `pegrad.per_example_grad`.
        LeafError: as `pegrad.per_example_grad`.

    >>> import torch, pegrad
    >>> def loss(params, example):
    ...     x, y = example
    ...     return (params["w"] @ x - y) ** 2
    >>> report = pegrad.check(loss, {"w": torch.ones(2)}, (torch.eye(2), torch.ones(2)))
    >>> [(leaf.path, leaf.verdict) for leaf in report.leaves]
    [("params['w']", 'same')]
    """
    check_size("examples", examples)
    clipping = None if clip_norm is None else as_clipping(clip_norm)
    subject = Subject.of(loss, params, batch, resolve(strategy), examples, clipping)
    loop = subject.loop()
    random = _is_random(subject, loop)
    notes = _notes(loop, random)
    found = _compare_in_both(subject, loop, random, notes)
    notes += _notes_after(found)
    report = _report(subject, strategy, loop, found, notes)
    if report.differing:
        coupled = subject.size > 1 and not random and compare(subject, loop, loop, alone=True).within()
        raise CheckError(_complaint(report, coupled), report)
    return report


def _compare_in_both(subject: Subject, loop: Loop, random: bool, notes: list[str]) -> list[Errors]:
    """Compare in float64, and in the given dtype with the loop in float64; a note says what cannot be run."""
    found = []
    reference, terms = loop, None
    if subject.dtype != torch.float64:
        try:
            wide = subject.to_float64()
            exact = wide.loop()
            if random:  # another precision may draw other numbers
                found.append(compare_random(wide, exact))
            else:
                probe = distance_of(loop, exact).over(torch.finfo(loop.narrowest).eps)
                found.append(compare(wide, exact, exact, probe))
                if bool(exact.finite[loop.finite].all()):
                    reference, terms = exact, probe
            if exact.narrowest != torch.float64:
                notes.append(f"The loss computes in {dtype_name(exact.narrowest)} even on float64 arguments.")
        except Exception as error:  # tensors of another dtype closed over, an operation that float64 does not have
            notes.append(f"float64 could not be run and was not compared: {_reason(error)}")
    found.append(compare_random(subject, loop) if random else compare(subject, loop, reference, terms))
    return found


def _is_random(subject: Subject, loop: Loop) -> bool:
    """Tell whether the loss draws from torch's generators.

    Raises:
        LossError: it depends on no leaf.
        CheckError: it differs from run to run for another reason, or has no finite gradient.
    """
    if not any(loop.used):
        raise independent()
    random = not loop.equals(subject.loop(seed=1000))
    if random and not loop.equals(subject.loop()):
        raise CheckError(
            "The loss gives different results for the same arguments and the same state of torch's generators, so it "
            "is not a pure function: look for a counter or a cache that it keeps, or for random numbers that are "
            "drawn elsewhere (numpy, random, a generator of its own)"
        )
    if not bool(loop.finite.any()):
        raise CheckError(
            f"None of the {subject.size} examples has a finite gradient, so there is nothing to compare: give other "
            "examples, or look for what overflows"
        )
    return random


def _notes(loop: Loop, random: bool) -> list[str]:
    notes = []
    if random:
        notes.append(
            "The loss draws random numbers: each example was compared by itself, from equal seeds, and norms and sum "
            "of several examples with the strategy's own stacked gradients."
        )
    if loop.strangers:
        notes.append(
            f"The loss also depends on {loop.strangers} tensor(s) that require a gradient and are not in params. They "
            "are constants here; if they are parameters to be trained, pass them in params."
        )
    left_out = int((~loop.finite).sum())
    if left_out:
        notes.append(f"{left_out} of {len(loop.finite)} examples were left out: their gradient is not finite.")
    return notes


def _notes_after(found: list[Errors]) -> list[str]:
    notes = []
    if any(isnan(errors.losses) for errors in found):
        notes.append(
            "The strategy draws other random numbers than the loop from the same seed, so its losses and gradients "
            "could not be compared with the loop's. Check once more with the randomness off (module.eval())."
        )
    if any(isnan(error) for errors in found for error in errors.sums):
        notes.append(
            "The sum was not compared: it holds an example whose gradient is finite in the strategy, and overflows in "
            "the loop, which computes all of it in half precision."
        )
    if shunned := max(errors.shunned for errors in found):
        notes.append(
            f"The strategy gave {shunned} example(s) no weight, and counts them as not finite: the terms of their "
            "gradients cancel so far that rounding could not be trusted. Norms and sum are compared on the others."
        )
    return notes


def _report(
    subject: Subject, strategy: str | Strategy, loop: Loop, found: list[Errors], notes: list[str]
) -> CheckReport:
    narrow, wide = [of.tolerance for of in found], [of.wide_tolerance for of in found]
    leaves = []
    for i, (path, leaf, used) in enumerate(zip(subject.names(), trees.leaves(subject.params), loop.used, strict=False)):
        grads, sums = [of.grads[i] for of in found], [of.sums[i] for of in found]
        wrong = [name for name, bad in (("gradient", _above(grads, narrow)), ("sum", _above(sums, wide))) if bad]
        verdict = "same" if used else "not used"
        if wrong:
            verdict = f"wrong {' and '.join(wrong)}"
        elif any(map(isnan, (*grads, *sums))):
            verdict = "sum only" if any(map(isnan, grads)) else "gradient only"
        leaves.append(LeafCheck(path, tuple(leaf.shape), tuple(map(worse, sums, grads)), verdict))
    values = []
    for name, errors, tolerances in (
        ("losses", [of.losses for of in found], narrow),
        ("norms", [of.norms for of in found], wide),
    ):
        verdict = "wrong" if _above(errors, tolerances) else "not compared" if any(map(isnan, errors)) else "same"
        values.append(LeafCheck(name, (subject.size,), tuple(errors), verdict))
    return CheckReport(
        strategy if isinstance(strategy, str) else type(strategy).__name__,
        subject.size,
        int((~loop.finite).sum()),
        tuple(of.dtype for of in found),
        tuple(of.tolerance for of in found),
        tuple(leaves),
        tuple(values),
        tuple(notes),
    )


def _above(errors: list[float], tolerances: list[float]) -> bool:
    return any(error > tolerance for error, tolerance in zip(errors, tolerances, strict=True))


def _complaint(report: CheckReport, coupled: bool) -> str:
    """Say which leaves differ, how much, and what to do."""
    rows = report.differing
    named = ", ".join(f"{row.path} ({row.verdict})" for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    cause = (
        "Each example by itself agrees: the loss makes examples depend on each other, or PyTorch has a wrong batching "
        "rule for one of its operations. "
        if coupled
        else ""
    )
    return (
        f"Strategy {report.strategy} differs from the plain loop by more than rounding: {named}{more}. {cause}"
        "A custom rule is the first suspect where there is one. Otherwise use a strategy that pegrad.check passes, "
        f"such as 'naive', and report the loss.\n{report}"
    )


def _reason(error: Exception) -> str:
    """Quote an error where it speaks of dtypes; others might quote the data."""
    text = " ".join(str(error).split())
    spoken = any(word in text for word in ("dtype", "scalar type", "Double", "not implemented for"))
    return f"{type(error).__name__}{': ' + text[:120] if spoken else ''}"
