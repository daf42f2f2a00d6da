"""The runner of every benchmark: its arguments, its results file, its clock.

A benchmark is a table of points, each a name and a function that measures it. Points that the results file has are
not measured again, so a run that was stopped goes on where it was. A file holds points of one machine, one set of
versions and settings, and one state of the library's code: what differs is refused, or started afresh on request.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from pegrad.papers import comparison

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("opacus", "backpack-for-pytorch", "jax", "jax-privacy")
Point = dict[str, Any]
ALLOCATORS: dict[str, dict[str, str]] = {
    "keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    "system": {},
}
"""Environments of a contestant's process. On Linux, freed memory goes back to the system by default, and each call pays
page faults to have it again, which on a virtual machine can cost more than the arithmetic. `keeping` keeps it, as
PyTorch's own allocator on a GPU does."""


class Effort(NamedTuple):
    """How much time a scale spends."""

    rounds: int
    """Rounds in which a contestant and the non-private gradient take turns."""
    step_rounds: int = 0
    """Rounds in which a whole step and its parts take turns."""
    budget: float = 0
    """Seconds after which a contestant that is not ours gets no further round; it always gets one."""
    limit: float = 300
    """Seconds after which the process of a contestant is ended."""


def parser(description: str, efforts: Mapping[str, Effort]) -> argparse.ArgumentParser:
    """Make the command line that all benchmarks share, for one to add its own to.

    Args:
        description: what the benchmark shows.
        efforts: by scale.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--scale", choices=efforts, default="cpu", help="how large the experiment is (%(default)s)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=int, help="threads of PyTorch on a CPU (its own choice)")
    made.add_argument("--allocator", choices=ALLOCATORS, default="keeping", help="what is done with freed memory")
    made.add_argument("--rounds", type=int, help="at most so many rounds for each contestant")
    made.add_argument("--budget", type=float, help="seconds after which a slow contestant gets no further round")
    made.add_argument("--limit", type=float, help="seconds after which a contestant is given up")
    made.add_argument("--out", type=Path, help="folder for JSON and pictures (benchmarks/results; smoke: out)")
    made.add_argument("--fresh", action="store_true", help="forget the points that the results file has")
    made.set_defaults(efforts=efforts)
    return made


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line and put it into force.

    Args:
        parser: made by the function of that name.
        argv: the arguments; None takes those of the process.

    Returns:
        What the arguments say, and `effort`, the scale's with what they change in it.
    """
    options = parser.parse_args(argv)
    changes = {name: getattr(options, name) for name in Effort._fields if getattr(options, name, None) is not None}
    options.effort = options.efforts[options.scale]._replace(**changes)
    options.out = options.out or (ROOT / "out" if options.scale == "smoke" else ROOT / "benchmarks" / "results")
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the contestants' own processes
    os.environ.update(ALLOCATORS[options.allocator])  # for those, too: a process reads it as it starts
    return options


class Results:
    """A file of finished points.

    Args:
        path: the JSON file; points that it has already are kept.
        settings: what the points depend on beside machine, versions and code.
        device: where the points are measured.
        fresh: forget the points that the file has.

    Raises:
        SystemExit: the file's points were measured under other conditions.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], device: str, *, fresh: bool = False) -> None:
        self.path = path
        self.header = {"settings": dict(settings), "device": device, "machine": machine(), "versions": versions()}
        self.points: dict[str, Point] = {}
        if path.exists() and not fresh:
            found = json.loads(path.read_text())
            self.points = found.pop("points")
            changed = [name for name in self.header if found.get(name) != json.loads(json.dumps(self.header[name]))]
            if changed:
                sys.exit(f"{path} holds points of other {', '.join(changed)}: choose another --out, or --fresh.")

    def __contains__(self, key: str) -> bool:
        return key in self.points

    def __getitem__(self, key: str) -> Point:
        return self.points[key]

    def where(self) -> str:
        """Say in a line what the points were measured on: a picture's small print."""
        machine, on_cpu = self.header["machine"], self.header["device"] == "cpu"
        where = f"{machine['processor']}, threads: {machine['threads']}" if on_cpu else machine["accelerator"]
        return f"{where}; PyTorch {machine['torch']}"

    def add(self, key: str, point: Point) -> None:
        """Write a point to the file; a run that is stopped while it does leaves the file as it was."""
        self.points[key] = point | {"date": datetime.now(UTC).isoformat(timespec="seconds"), **_commit()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.header | {"points": self.points}, indent=1) + "\n")
        unfinished.replace(self.path)


def run(points: Mapping[str, Callable[[], Point]], results: Results) -> None:
    """Measure the points that the results do not have, and show how far it is."""
    missing = {key: measure for key, measure in points.items() if key not in results}
    with tqdm(missing.items(), unit="point") as bar:
        for key, measure in bar:
            bar.set_postfix_str(key)
            results.add(key, measure())


def spread(values: Iterable[float]) -> Point:
    """Return the median of numbers, and their quartiles as `low` and `high`."""
    low, middle, high = np.percentile(list(values), [25, 50, 75]).tolist()
    return {"median": middle, "low": low, "high": high}


def machine() -> Point:
    """Describe the machine: a time means little without it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "conv": torch.backends.cudnn.allow_tf32}
    return {**comparison.machine(), "memory_gb": round(memory / 1e9, 1), "tf32": tf32}


def versions() -> Point:
    """Return the versions of what is measured, the library's as a hash of its code; None: not installed."""
    names = "numpy", "optree", *PEERS
    return {"pegrad": _library(), **{name: _version(name) for name in names}}


def _library() -> str:
    files = sorted((ROOT / "src" / "pegrad").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> Point:
    """The commit that is checked out, and whether code has changed since; None where git cannot tell."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(changes) if commit else None}


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
