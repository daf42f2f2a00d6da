"""The quick comparison of Rochette et al. 2019: 2 layers of 25 channels, k = 5, 32×32, a batch of 10.

    python benchmarks/quick.py [--scale smoke|cpu|full]

On the paper's GPU the strategies are apart; on a CPU, it says, they come out alike.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

import report
import runner
import toy
from pegrad.strategies import STRATEGIES
from runner import Effort, Results

EFFORTS = {
    "smoke": Effort(rounds=1),
    "cpu": Effort(rounds=15),
    "full": Effort(rounds=50),
}
SIZES = {"channels": 25, "layers": 2, "kernel_size": 5, "image_size": 32}
BATCH_SIZE = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Measure if need be, and print the table."""
    options = runner.parse(runner.parser("The quick comparison of Rochette et al. 2019.", EFFORTS), argv)
    path = options.out / f"quick_{options.scale}_{options.device}.json"
    results = Results(
        path, {"rounds": options.effort.rounds, "allocator": options.allocator}, options.device, fresh=options.fresh
    )
    strategies = {"naive": STRATEGIES["naive"], **toy.STRATEGIES_OF_FIGURES}
    runner.run({"quick": lambda: toy.measure(SIZES, BATCH_SIZE, strategies, options.effort, options.device)}, results)
    table = Table("clipped gradient", "milliseconds", "× non-private", title="25 channels, 2 layers, k=5, 32², B=10")
    for name, seconds in results["quick"]["seconds"].items():
        table.add_row(name, f"{1e3 * seconds:.1f}", report.with_quartiles(results["quick"]["ratio"][name]))
    Console(width=100).print(table)
    print(path)


if __name__ == "__main__":
    main()
