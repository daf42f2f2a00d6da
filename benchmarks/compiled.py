"""What compiling makes of the whole private step: time, peak memory, and after how many steps it has paid.

    python benchmarks/compiled.py [--scale smoke|cpu|full] [--only WORKLOAD ...] [--optimizers sgd adam]

An ordinary step, eager and with its forward and backward pass and its update compiled by `torch.compile`; our private
step, eager and by `pegrad.compile`, which takes the fastest for the gradient, and the fastest for noise and update: the
graph run operation by operation, Inductor, or no graph, in place like the ordinary step; and Opacus's private step by
hooks. Noise is a part of every private step, the update of all. Steps take turns in one process; a process of its own
for each says what it needs at its peak. The ratio is to the better of the ordinary steps.
"""

from collections.abc import Sequence
from functools import partial

from rich.console import Console

import report
import runner
from contest import CLIP_NORM
from runner import Effort, Results
from whole_step import COMPILED, OPTIMIZERS, table, whole_step
from workloads import SCALES

EFFORTS = {
    "smoke": Effort(rounds=2, step_rounds=2),
    "cpu": Effort(rounds=7, step_rounds=7),
    "full": Effort(rounds=25, step_rounds=25),
}
_NETWORKS = ["vgg11", "vgg19", "resnet18", "vit", "bert", "gpt2", "llama", "lstm"]
ROWS = {"smoke": ["tiny"], "cpu": _NETWORKS, "full": _NETWORKS}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("What compiling makes of the whole private step.", EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="these workloads; all of the scale's")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], help="these; all")
    options = runner.parse(parser, argv)
    workloads = {row: SCALES[options.scale][row] for row in options.only or ROWS[options.scale]}
    path = options.out / f"compiled_{options.scale}_{options.device}.json"
    settings = {"clip_norm": CLIP_NORM, "allocator": options.allocator, **options.effort._asdict()}
    results = Results(path, settings, options.device, fresh=options.fresh)
    how = {"effort": options.effort, "device": options.device, "names": COMPILED}
    lines = [(row, optimizer) for row in workloads for optimizer in options.optimizers]
    points = {f"{row}/{name}": partial(whole_step, name, workloads[row], **how) for row, name in lines}
    runner.run(points, results)
    console = Console(width=140)
    for row, name in lines:
        console.print(table(f"Whole step by {name}: {report.caption(row, workloads[row])}", results[f"{row}/{name}"]))
    console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    main()
