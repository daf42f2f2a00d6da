"""What clipping costs: every way to a batch's clipped gradient, and the whole private step, against no privacy.

    python benchmarks/clipped_grad.py [--scale smoke|cpu|full] [--only WORKLOAD ...] [--out DIR]

prints two tables, and writes what was measured as JSON and as a picture. See `benchmarks/README.md`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

import plotting
import report
import runner
from contest import CLIP_NORM, contest, memory
from contestants import BASELINE, CONTESTANTS
from runner import Effort, Results
from whole_step import COMPILED, OPTIMIZERS, WITH_PARTS, table, whole_step
from workloads import SCALES, SHAPES

EFFORTS = {
    "smoke": Effort(rounds=2, step_rounds=2, budget=1, limit=60),
    "cpu": Effort(rounds=5, step_rounds=3, budget=5, limit=300),
    "full": Effort(rounds=15, step_rounds=15, budget=60, limit=300),
}
TITLE = "Clipped gradient over non-private gradient"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment that a command line asks for."""
    compare(_options(argv))


def compare(options: argparse.Namespace) -> None:
    """Measure what is missing, then show all of it.

    Args:
        options: of the runner's parser, and `only`, the workloads; `contestants`; `optimizers` of whole steps;
            `compiled`, whether those are compiled as well; and `points` and `picture`, what the file of the points and
            the picture are called.
    """
    workloads = {name: SCALES[options.scale][name] for name in options.only}
    contestants = [name for name in CONTESTANTS if name in {BASELINE, *options.contestants}]
    lines = [(row, name) for row in workloads for name in contestants]
    steps = {(row, name): f"step/{row}/{name}" for row in workloads for name in options.optimizers}
    names = [*dict.fromkeys([*COMPILED, *WITH_PARTS])] if options.compiled else WITH_PARTS

    path = options.out / f"{options.points}_{options.scale}_{options.device}.json"
    picture = options.out / f"{options.picture}_{options.scale}_{options.device}.png"
    settings = {"clip_norm": CLIP_NORM, "allocator": options.allocator, **options.effort._asdict()}
    results = Results(path, settings, options.device, fresh=options.fresh)
    how = {"effort": options.effort, "device": options.device}
    with TemporaryDirectory() as folder:
        points = {
            f"gradient/{row}/{name}": partial(contest, name, row, workloads[row], **how, references=Path(folder, row))
            for row, name in lines
        }
        points |= {
            key: partial(whole_step, name, workloads[row], **how, names=names) for (row, name), key in steps.items()
        }
        points |= {f"memory/{row}/{name}": partial(memory, name, row, workloads[row], **how) for row, name in lines}
        runner.run(points, results)

    console = Console(width=max(Console().width, 110))
    measured = {
        row: {
            name: report.joined(results[f"gradient/{row}/{name}"], results[f"memory/{row}/{name}"])
            for name in contestants
        }
        for row in workloads
    }
    for row, points in measured.items():
        console.print(report.gradient_table(report.caption(row, workloads[row]), points))
    for (row, name), key in steps.items():
        console.print(table(f"Whole step by {name}: {report.caption(row, workloads[row])}", results[key]))
    note = f"{results.where()}. Dots: medians over the rounds; bars: quartiles."
    plotting.ratio_dots(report.ratios(measured, workloads), TITLE, note).savefig(picture)
    console.print(f"{path}, {picture}", soft_wrap=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.parser("What clipping costs, against the non-private gradient and step.", EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="these workloads; all of the papers'")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], help="these; all")
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=[*OPTIMIZERS], help="these; all")
    parser.add_argument("--compiled", action="store_true", help="whole steps also compiled, which takes minutes each")
    parser.set_defaults(points="clipped_grad", picture="clipped_grad")
    options = runner.parse(parser, argv)
    known = SCALES[options.scale]
    options.only = options.only or [name for name in known if name not in SHAPES]  # those are `modules.py`'s
    if unknown := set(options.only) - set(known):
        parser.error(f"no workload {', '.join(sorted(unknown))} at scale {options.scale}: there are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
