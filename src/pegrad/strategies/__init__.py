"""How per-example gradients are computed: one file a strategy, one table of them, one resolver."""

from pegrad.errors import ArgumentError
from pegrad.strategies.base import Strategy
from pegrad.strategies.grouped_conv import GroupedConv
from pegrad.strategies.naive import Naive
from pegrad.strategies.vmap import Vmap

STRATEGIES: dict[str, Strategy] = {
    "naive": Naive(),
    "vmap": Vmap(),
    "grouped_conv": GroupedConv(),
}


def resolve(strategy: str | Strategy) -> Strategy:
    """Return the strategy that a user named; `auto` is the one that is fastest as a rule.

    Args:
        strategy: a key of `STRATEGIES`, `auto`, or a strategy of one's own.

    Raises:
        ArgumentError: no strategy has that name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return STRATEGIES["grouped_conv"]
    if strategy not in STRATEGIES:
        raise ArgumentError(f"Expected strategy to be one of {['auto', *STRATEGIES]}, got {strategy!r}")
    return STRATEGIES[strategy]


__all__ = ["STRATEGIES", "GroupedConv", "Naive", "Strategy", "Vmap", "resolve"]
