"""How per-example gradients are computed: one file a strategy, one table of them, one resolver."""

from pegrad.errors import ArgumentError
from pegrad.strategies.auto import Auto
from pegrad.strategies.base import Stacking, Strategy
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.strategies.ghost import Ghost
from pegrad.strategies.grouped_conv import GroupedConv
from pegrad.strategies.naive import Naive
from pegrad.strategies.traced import Traced
from pegrad.strategies.vmap import Vmap

STRATEGIES: dict[str, Strategy] = {
    "naive": Naive(),
    "vmap": Vmap(),
    "grouped_conv": GroupedConv(),
    "ghost": Ghost(),
    "book_keeping": BookKeeping(),
    "auto": Auto(),
}


def resolve(strategy: str | Strategy) -> Strategy:
    """Return the strategy that a user named.

    Args:
        strategy: a key of `STRATEGIES`, or a strategy of one's own.

    Raises:
        ArgumentError: no strategy has that name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise ArgumentError(f"Expected strategy to be one of {[*STRATEGIES]}, got {strategy!r}")
    return STRATEGIES[strategy]


def resolve_traced(strategy: str | Strategy) -> Traced:
    """Return the strategy that a user named, if it chooses site by site; of `auto`, what that tries first.

    Raises:
        ArgumentError: it does not, or no strategy has that name.
    """
    chosen = resolve(strategy)
    if isinstance(chosen, Auto):
        return BookKeeping()
    if not isinstance(chosen, Traced):
        raise ArgumentError(
            f"Expected a strategy that chooses site by site (auto, book_keeping, ghost), got {strategy!r}"
        )
    return chosen


__all__ = [
    "STRATEGIES", "Auto", "BookKeeping", "Ghost", "GroupedConv", "Naive", "Stacking", "Strategy", "Vmap", "resolve",
    "resolve_traced",
]  # fmt: skip
