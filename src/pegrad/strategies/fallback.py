"""How `auto` steps down: where its strategy cannot run a loss, the loop runs it, and one warning says why.

Nothing steps down where the loop would give a wrong number too: batch normalisation in training mode, a loss that
changes its arguments or depends on no parameter. Those are `LossError` and `LeafError`; what only a strategy cannot do
is a `StrategyError`, or an exception that is not pegrad's.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

from pegrad.errors import FallbackWarning, PegradError, StrategyError
from pegrad.problem import Problem
from pegrad.strategies.base import Strategy
from pegrad.strategies.failures import out_of_memory, reason
from pegrad.strategies.naive import Naive
from pegrad.strategies.paths import ByPath, TooManyPathsError
from pegrad.tracing.generators import Generators

T = TypeVar("T")

_warned: WeakSet[Any] = WeakSet()


def stepping_down(strategy: Strategy, problem: Problem, ask: Callable[[Strategy, Problem], T]) -> T:
    """Ask a strategy, path by path, and where it cannot answer, the loop.

    Args:
        strategy: the strategy.
        problem: what it is asked about.
        ask: `(strategy, problem) -> answer`.

    Returns:
        The answer.

    Raises:
        Exception: the loop's own, if it fails as well; and what it would not help with.

    Warns:
        FallbackWarning: the loop answers; once for each loss.
    """
    start = Generators.now()
    try:
        return ask(ByPath(strategy, most_paths(problem.batch_size)), problem)
    except Exception as error:
        why = cause(error)
        if why is None:
            raise
    start.restore()
    # The answer is a constant, as the strategy's would be.
    constant = replace(
        problem,
        params=[leaf.detach() for leaf in problem.params],
        batch=[leaf.detach() for leaf in problem.batch],
    )
    answer = ask(Naive(), constant)
    _warn(problem.loss, f"{why}. {_PRICE}")  # now that the loop can, it is no mistake in the loss
    return answer


def most_paths(batch_size: int) -> int:
    """Return how many paths a batch may take before the loop is cheaper than running each by itself."""
    return max(4, batch_size // 4)


def try_the_loop(problem: Problem) -> None:
    """Run the loop on one example, for its own error if it has one."""
    Naive().stacked(replace(problem, batch=[leaf[:1] for leaf in problem.batch], mask=None))


def cause(error: BaseException) -> str | None:
    """Say why the loop would be asked in place of a strategy that ended with an error; None: it would not be.

    The words hold no number of the batch's.
    """
    if isinstance(error, TooManyPathsError):
        return f"Its examples take {error.paths} paths or more through it (they differ in {error.question})"
    if isinstance(error, StrategyError):
        return str(error).split(":")[0]
    if isinstance(error, PegradError) or not isinstance(error, Exception) or out_of_memory(error):
        return None
    return reason(error).replace(" (above)", "")


_PRICE = (
    "So the loop over the examples runs it (strategy 'naive'): exact, but several times slower, as nothing is computed "
    "for more than one example at a time"
)


def _warn(loss: Callable[..., Any], message: str) -> None:
    """Warn, once for each loss."""
    function = getattr(loss, "function", loss)
    try:
        if function in _warned:
            return
    except TypeError:  # neither hashed nor held weakly: warned of each time
        warnings.warn(message, FallbackWarning, stacklevel=2)
        return
    name = getattr(function, "__qualname__", type(function).__name__)
    warnings.warn(f"auto cannot run {name} on all examples at once. {message}", FallbackWarning, stacklevel=2)
    _warned.add(function)
