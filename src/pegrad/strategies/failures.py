"""Whose failure it is when an exception that is not pegrad's ends a call: the loss's, or the strategy's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from pegrad.errors import PegradError, StrategyError
from pegrad.problem import Problem
from pegrad.strategies.base import Strategy
from pegrad.strategies.naive import Naive
from pegrad.torch_internals import transformed
from pegrad.tracing.explanations import explanation
from pegrad.tracing.questions import Split


@contextmanager
def attributed(strategy: Strategy, problem: Problem) -> Iterator[None]:
    """Inside the block, a strategy runs; an exception that is not pegrad's ends it with an answer to whose it is.

    The plain loop is asked, and only then: nothing is spent where nothing fails. Running out of memory is passed on
    as it is.

    Args:
        strategy: what runs.
        problem: what it runs on.

    Raises:
        StrategyError: the plain loop can differentiate the loss, or the examples take different paths through it, and
            nobody has asked which. The message names no number of the batch's; the
            exception that started it is its cause.
        Exception: the plain loop's own, if it fails as well.
    """
    try:
        yield
        return
    except (PegradError, Warning):  # a warning is one where the caller has made errors of them
        raise
    except Split as split:
        raise StrategyError(
            f"The loss asks a tensor for its value ({split.question}), and examples give different answers, which this "
            "function cannot follow: write it with torch.where, or ask for stacked gradients, which every path gives"
        ) from None
    except Exception as error:
        if out_of_memory(error):
            raise
        failure = error
    advice = _ask_the_loop(strategy, problem)
    # An exception's own words may hold an example's numbers.
    raise StrategyError(f"{type(strategy).__name__} cannot run this loss. {reason(failure)}. {advice}") from failure


def reason(failure: Exception) -> str:
    """Say why a strategy could not run a loss."""
    operation = getattr(failure, "pegrad_operation", None)
    where = f" in {operation}" if operation else ""
    return explanation(failure) or f"It ended with a {type(failure).__name__}{where} (above)"


def _ask_the_loop(strategy: Strategy, problem: Problem) -> str:
    """Say what to do in the strategy's place; raise the loop's exception if that fails on any of the examples."""
    first = replace(problem, batch=[leaf[:1] for leaf in problem.batch])
    if transformed():  # where plain autograd may not be called
        Naive().stacked(first)
        return "Use strategy='naive', a loop over the examples, which can"
    leaves = [leaf.detach().requires_grad_() for leaf in problem.params]
    with torch.enable_grad():
        for b in range(problem.batch_size):
            loss, _ = problem.loss(leaves, [leaf[b] for leaf in problem.batch])
            if b == 0 and loss.requires_grad:
                torch.autograd.grad(loss, leaves, allow_unused=True)
    if not isinstance(strategy, Naive):
        try:
            Naive().stacked(first)
        except Exception:
            return "Plain autograd can, but so far no strategy"
        return "Use strategy='naive', a loop over the examples, which can"
    return "Plain autograd can, but so far no strategy"


def out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, which is no strategy's and no loss's fault."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
