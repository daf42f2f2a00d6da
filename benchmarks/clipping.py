"""What each kind of clipping costs: time and peak memory of the clipped gradient, against no privacy.

    python benchmarks/clipping.py [--scale smoke|cpu|full] [--only WORKLOAD ...]

One norm over all leaves (`auto`, `ghost`), one for each leaf or layer, automatic; and Opacus, flat and with a bound for
every parameter. By leaf or layer, `auto` sums inside the backward pass and keeps nothing for later: its memory should
be that of the non-private gradient, its time that of one norm. Adaptive clipping is a part of the step, which releases
counts as well: the whole step with it, ours and Opacus's, over ours with a fixed clip norm.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

import plotting
import report
import runner
from contest import CLIP_NORM, contest, memory
from contestants import BASELINE, CLIPPINGS
from runner import Effort, Results
from whole_step import ADAPTIVE, FLAT, adaptive_step
from workloads import SCALES

EFFORTS = {
    "smoke": Effort(rounds=2, budget=1, limit=60),
    "cpu": Effort(rounds=5, budget=5, limit=300),
    "full": Effort(rounds=15, budget=60, limit=300),
}
CONTESTANTS = BASELINE, "auto", "ghost", *CLIPPINGS, "Opacus"
_NETWORKS = ["vgg19", "resnet18", "vit", "gpt2"]
ROWS = {"smoke": ["tiny"], "cpu": _NETWORKS, "full": _NETWORKS}
TITLE = "Clipped gradient over non-private gradient, by clipping"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("What each kind of clipping costs, against the non-private gradient.", EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="these workloads; all of the scale's")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], help="these; all")
    options = runner.parse(parser, argv)
    workloads = {row: SCALES[options.scale][row] for row in options.only or ROWS[options.scale]}
    contestants = [name for name in CONTESTANTS if name in {BASELINE, *options.contestants}]
    stem = options.out / f"clipping_{options.scale}_{options.device}"
    settings = {"clip_norm": CLIP_NORM, "allocator": options.allocator, **options.effort._asdict()}
    results = Results(stem.with_suffix(".json"), settings, options.device, fresh=options.fresh)
    how = {"effort": options.effort, "device": options.device}
    lines = [(row, name) for row in workloads for name in contestants]
    with TemporaryDirectory() as folder:
        points = {
            f"gradient/{row}/{name}": partial(contest, name, row, workloads[row], **how, references=Path(folder, row))
            for row, name in lines
        }
        points |= {f"memory/{row}/{name}": partial(memory, name, row, workloads[row], **how) for row, name in lines}
        steps = [(row, name) for row in workloads for name in ADAPTIVE]
        points |= {f"step/{row}/{name}": partial(adaptive_step, name, workloads[row], **how) for row, name in steps}
        runner.run(points, results)
    measured = {
        row: {
            name: report.joined(results[f"gradient/{row}/{name}"], results[f"memory/{row}/{name}"])
            for name in contestants
        }
        for row in workloads
    }
    console = Console(width=max(Console().width, 110))
    for row, points in measured.items():
        console.print(report.gradient_table(report.caption(row, workloads[row]), points))
    console.print(_steps(results, list(workloads)))
    note = f"{results.where()}. Dots: medians over the rounds; bars: quartiles."
    plotting.ratio_dots(report.ratios(measured, workloads), TITLE, note).savefig(stem.with_suffix(".png"))
    console.print(f"{stem}.json, {stem}.png", soft_wrap=True)


def _steps(results: Results, rows: Sequence[str]) -> Table:
    table = report.table(
        "The whole step over pegrad's with a fixed clip norm", "workload", "step", "seconds", f"× {FLAT}"
    )
    for row in rows:
        for name in ADAPTIVE:
            point = results[f"step/{row}/{name}"]
            if "failure" in point:
                table.add_row(row, name, "", point["failure"], style="dim")
            else:
                table.add_row(row, name, f"{point['seconds'][name]:.3f}", report.with_quartiles(point["ratio"]))
    return table


if __name__ == "__main__":
    main()
