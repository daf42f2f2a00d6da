"""What a change of the library costs: the clipped gradient by this code, over that by another commit's.

    python benchmarks/versions.py COMMIT [--only vgg11 ...] [--strategies auto ghost] [--scale smoke|cpu|full]

Each of the two has a process of its own, and they take turns, one call each; what is reported is the ratio of a round.
The other commit's files are laid out in a temporary folder, and each runs its own workloads: a commit that changes one
is not to be compared over it.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

import report
import runner
from runner import ROOT, Effort, Point, Results

EFFORTS = {
    "smoke": Effort(rounds=2),
    "cpu": Effort(rounds=30),
    "full": Effort(rounds=50),
}
DEFAULT = {"smoke": ["tiny"], "cpu": ["vgg11", "resnet18", "vit"], "full": ["vgg11", "resnet18", "vit"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure if need be, and print the table."""
    parser = runner.parser("The clipped gradient by this code, over that by another commit's.", EFFORTS)
    parser.add_argument("commit", help="the other commit")
    parser.add_argument("--only", nargs="+", help="workloads (VGG11, ResNet18, ViT)")
    parser.add_argument("--strategies", nargs="+", default=["auto"])
    options = runner.parse(parser, argv)
    names = options.only or DEFAULT[options.scale]
    path = options.out / f"versions_{options.scale}_{options.device}.json"
    settings = {"commit": options.commit, "rounds": options.effort.rounds, "allocator": options.allocator}
    results = Results(path, settings, options.device, fresh=options.fresh)
    with laid_out(options.commit) as other:
        points = {
            f"{name} {strategy}": lambda name=name, strategy=strategy: measure(other, name, strategy, options)
            for name in names
            for strategy in options.strategies
        }
        runner.run(points, results)
    table = Table("workload", "strategy", "this / other", title=f"clipped gradient, over that of {options.commit}")
    for key, point in results.points.items():
        table.add_row(*key.split(), report.with_quartiles(point["ratio"]))
    Console(width=100).print(table)
    print(path)


def measure(other: Path, name: str, strategy: str, options: object) -> Point:
    """Let the two take turns."""
    ours, theirs = (_process(root, name, strategy, options) for root in (ROOT, other))
    seconds: dict[str, list[float]] = {"this": [], "other": []}
    for turn in range(options.effort.rounds):  # type: ignore[attr-defined]
        order = [("this", ours), ("other", theirs)]
        for who, process in order if turn % 2 else order[::-1]:
            seconds[who].append(_ask(process))
    for process in (ours, theirs):
        process.communicate()
    ratios = [a / b for a, b in zip(seconds["this"], seconds["other"], strict=True)]
    return {"ratio": runner.spread(ratios)} | {who: runner.spread(times) for who, times in seconds.items()}


@contextmanager
def laid_out(commit: str) -> Iterator[Path]:
    """Lay out another commit's files in a temporary folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def _process(root: Path, name: str, strategy: str, options: object) -> subprocess.Popen:
    scale, device = options.scale, options.device  # type: ignore[attr-defined]
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "serve.py"), scale, name, strategy, device]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / part) for part in ("src", "benchmarks"))}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen) -> float:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


if __name__ == "__main__":
    main()
