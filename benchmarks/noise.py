"""Noise by either cipher: the seconds that standard normals take, over those of AES.

    python benchmarks/noise.py [--scale smoke|cpu|full]

The keystream of AES is made on the CPU, wherever the numbers are wanted; that of ChaCha20 is made where they are,
operation by operation, or compiled by Inductor (not at the smallest scale: it takes a minute). `torch.randn`, which is
not made for privacy, shows what numbers cost at the least. All of it in turns, in one process.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import report
import runner
from pegrad import random
from pegrad.papers.comparison import interleaved
from pegrad.random import Cipher, chacha
from runner import Effort, Point, Results, spread

EFFORTS = {"smoke": Effort(rounds=2), "cpu": Effort(rounds=30), "full": Effort(rounds=100)}
COUNTS = {"smoke": [1_000], "cpu": [1_000, 100_000, 10_000_000], "full": [1_000, 100_000, 10_000_000, 100_000_000]}
BASELINE = "AES"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure if need be, and print the table."""
    options = runner.parse(runner.parser("Noise by either cipher.", EFFORTS), argv)
    path = options.out / f"noise_{options.scale}_{options.device}.json"
    settings = {"rounds": options.effort.rounds, "allocator": options.allocator}
    results = Results(path, settings, options.device, fresh=options.fresh)
    rounds, compiled = options.effort.rounds, options.scale != "smoke"
    points = {f"{n:,}": lambda n=n: _measure(n, compiled, rounds, options.device) for n in COUNTS[options.scale]}
    runner.run(points, results)
    table = Table("normals", "by", "ms", "× AES", title="float32 normals")
    for key in points:
        for name, ratio in results[key]["ratio"].items():
            milliseconds = 1e3 * results[key]["seconds"][name]
            table.add_row(key, name, f"{milliseconds:.2f}", report.with_quartiles(ratio))
    Console(width=100).print(table)
    print(path)


def _measure(count: int, compiled: bool, rounds: int, device: str) -> Point:
    times = interleaved(_functions(count, compiled, device), rounds, device)
    ratios = {name: spread(a / b for a, b in zip(own, times[BASELINE], strict=True)) for name, own in times.items()}
    return {"seconds": {name: median(own) for name, own in times.items()}, "ratio": ratios}


def _functions(count: int, compiled: bool, device: str) -> dict[str, Callable[[], Any]]:
    key = random.key(0)
    functions: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: random.normal(key, (count,), device=device, cipher=Cipher.AES),
        "ChaCha20": lambda: random.normal(key, (count,), device=device, cipher=Cipher.CHACHA20),
        "torch.randn": lambda: torch.randn(count, device=device),
    }
    if compiled:
        leaf = torch.empty(count, device=device)
        words = chacha.key_words(random.leaf_keys(key, [leaf], cipher=Cipher.CHACHA20)[0]).to(device)
        draw = torch.compile(chacha.normals, fullgraph=True, dynamic=False)
        functions["ChaCha20, compiled"] = lambda: draw(words, count, 0, torch.float32)
    return functions


if __name__ == "__main__":
    main()
