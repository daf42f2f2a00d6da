"""Plant every bug of `mutants.py` in a copy of the package, and see a test fail: `python tests/mutants/run.py [-k word]`.

The checkout itself is never touched. A bug is killed if the tests named for it fail with it and pass without it. Ends
with status 1 if a bug survives, if its text is not in its file exactly once, or if its tests fail without it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
TIMEOUT = 150  # seconds for one selection of tests; a mutant that hangs is noticed, so it is killed
_PASSED, _FAILED, _NOT_COLLECTED, _NO_IMPORT, _NO_TIME = 0, 1, 2, 90, 124  # statuses; the first three are pytest's

# The package is imported before pytest can put the checkout's own first, and from the copy or not at all.
_PROGRAM = f"""
import sys
copy, *arguments = sys.argv[1:]
sys.path.insert(0, copy)
try:
    import pegrad
except Exception as error:
    print("E  ", repr(error))
    sys.exit({_NO_IMPORT})
assert pegrad.__file__.startswith(copy), pegrad.__file__
import pytest
sys.exit(pytest.main(arguments))
"""


class Run(NamedTuple):
    """How a selection of tests ended."""

    status: int
    reason: str  # the first test that failed and how; else the last line of output


def run_tests(tests: str, mutant: Mutant | None) -> Run:
    """Run tests on a fresh copy of the package, with a bug or without."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = copy / "pegrad" / mutant.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutant.text, mutant.bug), encoding="utf-8")
        path, _, keyword = tests.partition(" -k ")
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *(["-k", keyword] if keyword else [])]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(copy),  # for what the tests start themselves
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": folder,  # or the counterexamples would be tried again on the right code
            "COLUMNS": "160",
        }
        command = [sys.executable, "-c", _PROGRAM, str(copy), f"tests/{path}", *options]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return Run(_NO_TIME, f"no end after {TIMEOUT} seconds")
        return Run(done.returncode, _reason(done.stdout + done.stderr))


def _reason(output: str) -> str:
    failed = re.search(r"^(?:FAILED|ERROR|E  ) .*$", output, re.MULTILINE)
    lines = output.strip().splitlines()
    return failed[0] if failed else lines[-1] if lines else "no output"


def judge(mutant: Mutant, clean: Run) -> tuple[str, str]:
    """Say what became of a mutant in a word or two, and how it is known."""
    found = (ROOT / "src" / "pegrad" / mutant.file).read_text(encoding="utf-8").count(mutant.text)
    if found != 1:
        return "text not found", f"it is there {found} times"
    if clean.status != _PASSED:
        return "tests fail without the mutant", clean.reason
    run = run_tests(mutant.tests, mutant)
    if run.status == _PASSED:
        return "SURVIVED", run.reason
    if run.status in (_FAILED, _NOT_COLLECTED, _NO_TIME):
        return "killed", run.reason
    return "does not import" if run.status == _NO_IMPORT else "tests did not run", run.reason


def main() -> int:
    """Run all mutants, or those chosen, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", metavar="word", default="", help="only mutants with this word in them")
    parser.add_argument("-v", action="store_true", help="say by which test each was killed")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.k.lower() in " ".join(mutant).lower()]
    start = time.monotonic()
    counts: dict[str, int] = {}
    with ThreadPoolExecutor(PROCESSES) as pool:
        clean = {tests: pool.submit(run_tests, tests, None) for tests in dict.fromkeys(m.tests for m in chosen)}
        # Only now, so that what a mutant waits for has begun before it.
        answers = [pool.submit(lambda m=mutant: judge(m, clean[m.tests].result())) for mutant in chosen]
        for mutant, answer in zip(chosen, answers, strict=True):
            verdict, reason = answer.result()
            counts[verdict] = counts.get(verdict, 0) + 1
            said = "" if verdict == "killed" and not options.v else f"\n    {mutant.tests}\n    {reason}"
            print(f"{verdict:10} {mutant.file}: {mutant.cost}{said}", flush=True)
    others = "".join(f", {count} {verdict}" for verdict, count in counts.items() if verdict != "killed")
    killed = counts.get("killed", 0)
    print(f"{len(chosen)} mutants, {killed} killed{others}, in {time.monotonic() - start:.0f} s")
    return int(killed != len(chosen) or not chosen)


if __name__ == "__main__":
    sys.exit(main())
