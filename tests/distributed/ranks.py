"""Processes on this machine that work together, for tests of `pegrad.distributed`."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pegrad

SIZES = 1, 2, 4
TIME_OUT = 30


class Pool:
    """Four processes that wait for jobs; each job runs in a group of the first one, two or four of them.

    A job is a function at the top of a module: `job(group, *args)`, called on every rank of the group alike.
    """

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.pipelining", "torch.distributed.checkpoint"])
        self._ends: list[Connection] = []
        self._processes = []
        sys.path.insert(0, str(Path(pegrad.__file__).parents[1]))  # the package that is tested here, for them too
        for rank in range(max(SIZES)):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there), daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)
        sys.path.pop(0)

    def run(self, job: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        """Run a job on so many ranks, and return what each returned, or the exception that it raised."""
        for end in self._ends[:size]:
            end.send((job, size, args))
        answers = []
        for end in self._ends[:size]:
            assert end.poll(4 * TIME_OUT), "a rank hangs"
            answers.append(end.recv())
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, port: int, end: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    limit = timedelta(seconds=TIME_OUT)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=max(SIZES), timeout=limit)
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in SIZES}
    while True:
        job, size, args = end.recv()
        try:
            end.send(job(groups[size], *args))
        except Exception as error:
            end.send(error)
