"""Processes on this machine that work together, for tests of `pegrad.distributed`."""

import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZES = 1, 2, 4


class Pool:
    """Four processes that wait for jobs; each job runs in a group of the first 1, 2 or 4 of them.

    A job is a function at the top of a module: `job(group, *args)`, called on every rank of the group alike.
    """

    def __init__(self, timeout: float = 30.0) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._answers = context.SimpleQueue()
        self._tasks = [context.SimpleQueue() for _ in range(max(SIZES))]
        meeting = Path(self._folder.name, "store")
        package = str(Path(sys.modules["pegrad"].__file__).parents[1])  # theirs is ours, wherever it lies
        self._processes = [
            context.Process(target=_serve, args=(rank, meeting, timeout, package, tasks, self._answers), daemon=True)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, job: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        """Run a job on so many ranks, and return what each returned, or the exception that it raised."""
        for tasks in self._tasks[:size]:
            tasks.put((job, size, args))
        answers = dict(self._answers.get() for _ in range(size))
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        """End the processes."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, meeting: Path, timeout: float, package: str, tasks: Any, answers: Any) -> None:
    sys.path.insert(0, package)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=meeting.as_uri(),
        rank=rank,
        world_size=max(SIZES),
        timeout=timedelta(seconds=timeout),
    )
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    while (task := tasks.get()) is not None:
        job, size, args = task
        try:
            answer = job(groups[size], *args)
        except Exception as error:
            answer = error
        answers.put((rank, answer))
    dist.destroy_process_group()
