"""Whose failure it is when an exception that is not pegrad's ends a call: the loss's, or the strategy's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from pegrad.errors import PegradError, StrategyError
from pegrad.strategies.base import Problem, Strategy
from pegrad.strategies.naive import Naive
from pegrad.tracing.batched import transformed

_REASONS = (
    (
        r"data-dependent control flow|\.item\(\)|Cannot access data pointer",
        "it asks for the value of a tensor (by if, bool, .item(), .tolist(), .numpy(), ...)",
    ),
    (r"saved tensor hooks|escaped from inside", "it runs again in the backward pass (activation checkpointing)"),
    (r"dynamic shape|masked_select", "it makes a tensor whose size depends on the example"),
    (r"in[- ]?place", "it writes in place to a tensor that the examples share"),
    (r"(aten::\w+(\.\w+)?)", r"PyTorch cannot vectorise \1"),
)
"""What errors of PyTorch's say, as a regular expression, and what that means for a loss of one example."""

_NAIVE = "Use strategy='naive', which can"


@contextmanager
def explained(strategy: Strategy, problem: Problem) -> Iterator[None]:
    """Inside the block, a strategy runs; an exception that is not pegrad's ends it with an answer to whose it is.

    The plain loop is asked, and only then: nothing is spent where nothing fails. Running out of memory is passed on
    as it is.

    Args:
        strategy: what runs.
        problem: what it runs on.

    Raises:
        StrategyError: the plain loop can differentiate the loss. The message names no number of the batch's; the
            exception that started it is its cause.
        Exception: the plain loop's own, if it fails as well.
    """
    try:
        yield
        return
    except PegradError:
        raise
    except Exception as error:
        if _out_of_memory(error):
            raise
        failure = error
    advice = _ask_the_loop(strategy, problem)
    raise StrategyError(f"{type(strategy).__name__} cannot run this loss: {_reason(failure)}. {advice}") from failure


def _ask_the_loop(strategy: Strategy, problem: Problem) -> str:
    """Say what to do in the strategy's place; raise the loop's exception if that fails on any of the examples."""
    first = replace(problem, batch=[leaf[:1] for leaf in problem.batch])
    if transformed():  # where plain autograd may not be called
        Naive().stacked(first)
        return _NAIVE
    leaves = [leaf.detach().requires_grad_() for leaf in problem.params]
    with torch.enable_grad():  # in all rows: a loss may call autograd itself
        for b in range(problem.batch_size):
            loss, _ = problem.loss(leaves, [leaf[b] for leaf in problem.batch])
            if b == 0 and loss.requires_grad:
                torch.autograd.grad(loss, leaves, allow_unused=True)
    try:
        Naive().stacked(first)
    except Exception:
        return "Plain autograd can, but so far no strategy"
    return _NAIVE


def _reason(error: Exception) -> str:
    """Say why in words of our own: an exception's may hold an example's numbers."""
    for pattern, meaning in _REASONS:
        if found := re.search(pattern, str(error)):
            return found.expand(meaning)
    return f"{type(error).__name__} (above)"


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
