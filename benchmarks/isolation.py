"""A call in a process of its own: what it needs at its peak is its own, and what fails does not take others along.

Peak memory is what one call needs beyond what the process held before it: parameters, batch and libraries are not in
it, the answer is. On a CPU it is the high-water mark of the resident set (Linux: `VmHWM`, set back just before the
call by writing 5 to `/proc/self/clear_refs`) less the resident set before the call. On a GPU it is that of PyTorch's
allocator.
"""

import ctypes
import gc
import multiprocessing
import os
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")
_M_MMAP_THRESHOLD, _M_MMAP_MAX = -3, -4  # of glibc's malloc.h
_LARGE = 1 << 17  # bytes of a block that has pages of its own


class FailedError(Exception):
    """A call did not answer; the message is a short phrase for a table."""


def in_own_process(function: Callable[..., Any], *args: Any, limit: float, device: str = "cpu") -> Any:
    """Call a function in a fresh process and return its value.

    Args:
        function: a function of a module, so that the other process finds it.
        args: its arguments; pickled, like its value.
        limit: seconds after which the process is ended.
        device: where the function computes. On a CPU the process may take nine tenths of the memory that is free,
            so that one contestant's appetite is its own failure and not the machine's.

    Raises:
        FailedError: the function raised, took longer than `limit`, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pegrad"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, device, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise FailedError(f"longer than {limit:g} s")
        value, failure = receiver.recv()
    except EOFError:
        raise FailedError("its process died") from None
    finally:
        process.kill()
        process.join()
    if failure:
        raise FailedError(failure)
    return value


def peak(function: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """Call a function and measure the memory that it needs at its peak.

    On a CPU with glibc, large blocks have pages of their own meanwhile, so that what is freed is free. An allocator
    that keeps freed memory cuts it up and needs more: nothing should have been computed in the process before, unless
    after `large_blocks_apart`. Gaps among the small blocks, such as compiling leaves, are filled for that time: a large
    block in one would stay there when it is freed.

    Returns:
        Its value, and bytes; None where the system cannot tell.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = function()
        return value, torch.cuda.max_memory_allocated() - before
    if not (_PROC / "clear_refs").exists():
        return function(), None
    libc = ctypes.CDLL(None)
    fillings = _fill_gaps(libc)
    large_blocks_apart()
    libc.malloc_trim(0)
    (_PROC / "clear_refs").write_text("5")
    before = _resident("VmRSS")
    value = function()
    needed = _resident("VmHWM") - before
    for filling in fillings:
        libc.free(filling)
    libc.mallopt(_M_MMAP_MAX, int(os.environ.get("MALLOC_MMAP_MAX_", 1 << 16)))
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # where glibc's own, growing threshold ends
    return value, needed


def large_blocks_apart() -> None:
    """Give large blocks pages of their own from here on, on a CPU with glibc."""
    if (_PROC / "clear_refs").exists():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 1 << 16)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _fill_gaps(libc: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """Take all room for a large block that is left below the end of the heap, without touching it."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.mallopt(_M_MMAP_MAX, 0)
    taken = []
    size = 1 << 28
    while size >= _LARGE:
        end = libc.sbrk(0)
        block = ctypes.c_void_p(libc.malloc(size))
        if libc.sbrk(0) == end and block and block.value < end:
            taken.append(block)
        else:  # there was no gap
            libc.free(block)
            size //= 2
    return taken


def _answer(sender: Connection, device: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    limit = _limit_memory() if torch.device(device).type == "cpu" else None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = function(*args)
        sender.send((value | {"warnings": sorted({_first_line(w.message) for w in caught})}, None))
    except Exception as error:
        sender.send((None, _phrase(error, limit)))


def _limit_memory() -> int | None:
    """Let this process have nine tenths of the memory that is free, beside what it has; return that in bytes."""
    if not (_PROC / "status").exists():
        return None
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    limit = int(free.split()[1]) * 1024 * 9 // 10
    data = _resident("VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    return limit


def _resident(field: str) -> int:
    lines = (_PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _phrase(error: Exception, limit: int | None) -> str:
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return "out of memory" + (f", {limit / 1e9:.0f} GB" if limit else "")
    if isinstance(error, NotImplementedError):
        return _first_line(error)
    return f"{type(error).__name__}: {_first_line(error)}"


# PyTorch's CPU allocator, XLA's, and the C++ library
_OUT_OF_MEMORY = "can't allocate memory", "RESOURCE_EXHAUSTED", "bad_alloc"


def _first_line(message: object) -> str:
    lines = str(message).splitlines() or [""]
    return lines[0][:100]
