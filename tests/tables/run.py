"""Judge the tables' uses and report; with words as arguments, only operations and modules that hold one of them.

From `tests`: `python -m tables.run [WORD ...]`, two processes.
"""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

import pegrad
from tables import modules, operations
from tables.uses import Use
from tables.verdict import Inapplicable, Kind, Truth


class Entry(NamedTuple):
    """What one strategy made of one use."""

    use: str
    strategy: str
    kind: Kind
    detail: str


def names() -> list[str]:
    """List what the tables hold: operations, then modules."""
    return [*operations.operations(), *modules.modules()]


def entries(name: str, samples: int | None = None) -> list[Entry]:
    """Judge the uses of one operation or module, from so many samples, under every strategy."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # PyTorch's remarks about slow and deprecated operations
        warnings.simplefilter("ignore")
        return [entry for use in _uses(name, samples) for entry in _judge(use)]


def _uses(name: str, samples: int | None) -> Iterator[Use]:
    found = modules.modules()
    if name in found:
        return modules.uses(found[name], samples or modules.SAMPLES)
    return operations.uses(operations.operations()[name], samples or operations.SAMPLES)


def _judge(use: Use) -> Iterator[Entry]:
    try:
        truth = Truth(use)
    except Inapplicable as reason:
        yield Entry(use.name, "", Kind.INAPPLICABLE, str(reason))
        return
    for strategy in pegrad.STRATEGIES:
        yield Entry(use.name, strategy, *truth.judge(strategy))


def bad(found: list[Entry]) -> list[Entry]:
    """Keep what must not be: wrong numbers, and errors that are not pegrad's."""
    return [entry for entry in found if entry.kind in (Kind.WRONG, Kind.RAW)]


def listed(found: list[Entry]) -> str:
    """Show entries, one a line."""
    return "\n".join(f"{e.kind.value:14}{e.use} {e.strategy}: {e.detail.partition(chr(10))[0][:160]}" for e in found)


def counted(found: list[Entry]) -> str:
    """Count entries by strategy and kind."""
    counts = Counter((entry.strategy, entry.kind.value) for entry in found)
    return "\n".join(f"{strategy:14}{kind:16}{count}" for (strategy, kind), count in sorted(counts.items()))


def main(words: list[str]) -> None:
    """Judge, and print counts and what is bad."""
    start = time.perf_counter()
    chosen = [name for name in names() if not words or any(word in name for word in words)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = [entry for part in pool.map(entries, chosen, chunksize=4) for entry in part]
    typed = sorted({e.use.partition("[")[0] for e in found if e.kind is Kind.TYPED})
    print(f"{counted(found)}\nfail, typed, under some strategy: {', '.join(typed)}\n{listed(bad(found))}")
    print(f"{len(found)} entries in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
