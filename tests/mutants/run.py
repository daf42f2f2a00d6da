"""Plant every bug of `mutants.py` in a copy of the package, and see a test fail: `python run.py [-k word]`.

The checkout itself is never touched. A bug is killed if the tests named for it fail with it and pass without it. Ends
with status 1 if a bug survives, if its text is not in its file exactly once, if its tests fail without it, or if it is
code that cannot run.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
TIMEOUT = 150  # seconds for one selection of tests; a mutant that hangs is noticed, so it is killed
_PASSED, _FAILED, _NOT_COLLECTED, _NO_IMPORT, _NO_TIME = 0, 1, 2, 90, 124  # statuses; the first three are pytest's
_CONTEXT = multiprocessing.get_context("forkserver")  # its children have what the package needs, but not the package


class Run(NamedTuple):
    """How a selection of tests ended."""

    status: int
    reason: str  # the first test that failed and how; else the last line of output


def run_tests(tests: str, mutant: Mutant | None) -> Run:
    """Run tests on a fresh copy of the package, with a bug or without."""
    with tempfile.TemporaryDirectory() as folder:
        copy, output = Path(folder) / "src", Path(folder) / "output"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = copy / "pegrad" / mutant.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutant.text, mutant.bug), encoding="utf-8")
        path, _, keyword = tests.partition(" -k ")
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *(["-k", keyword] if keyword else [])]
        process = _CONTEXT.Process(target=_child, args=(str(copy), str(output), [f"tests/{path}", *options]))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            return Run(_NO_TIME, f"no end after {TIMEOUT} seconds")
        assert process.exitcode is not None
        return Run(process.exitcode, _reason(output.read_text(encoding="utf-8")))


def _child(copy: str, output: str, options: list[str]) -> None:
    """Run pytest with the package from the copy, which is imported before pytest can find the checkout's own."""
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = copy  # for what the tests start themselves
    sys.dont_write_bytecode = True
    sys.path.insert(0, copy)
    try:
        import pegrad
    except Exception as error:
        print("E  ", repr(error), flush=True)
        sys.exit(_NO_IMPORT)
    assert pegrad.__file__.startswith(copy), pegrad.__file__
    import pytest

    sys.exit(pytest.main(options))


def _reason(output: str) -> str:
    failed = re.search(r"^(?:FAILED|ERROR|E  ) .*$", output, re.MULTILINE)
    lines = output.strip().splitlines()
    return failed[0] if failed else lines[-1] if lines else "no output"


def judge(mutant: Mutant, clean: Future[Run]) -> tuple[str, str]:
    """Say what became of a mutant in a word or two, and how it is known."""
    found = (ROOT / "src" / "pegrad" / mutant.file).read_text(encoding="utf-8").count(mutant.text)
    if found != 1:
        return "text not found", f"it is there {found} times"
    run = run_tests(mutant.tests, mutant)
    if clean.result().status != _PASSED:
        return "tests fail without the mutant", clean.result().reason
    if re.search(r"\b(NameError|SyntaxError)\b", run.reason):  # any test would see that
        return "no bug but a slip", run.reason
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
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    _CONTEXT.set_forkserver_preload(["torch", "cryptography", "optree", "scipy.stats", "pytest"])
    counts: dict[str, int] = {}
    clean: dict[str, Future[Run]] = {}
    answers = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        # Elsewhere than usual, or the counterexamples would be tried again on the right code.
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
        for mutant in chosen:
            if mutant.tests not in clean:
                clean[mutant.tests] = pool.submit(run_tests, mutant.tests, None)
            answers.append(pool.submit(judge, mutant, clean[mutant.tests]))
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
