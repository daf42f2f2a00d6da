"""How many examples fit: the size of a micro-batch, found by measuring what clipped gradients need at their peak."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pegrad import trees
from pegrad._validate import check_size
from pegrad.accumulation import FEW, Sums
from pegrad.errors import ArgumentError
from pegrad.per_example import ClippedGrad
from pegrad.strategies.failures import out_of_memory
from pegrad.tracing.eager import outermost
from pegrad.trees import PyTree

_PROC, _CGROUP = Path("/proc/self"), Path("/sys/fs/cgroup")
_MARGIN = 3  # twice the examples need at most twice the memory; what is free must be half as much again


@outermost
def largest_microbatch(clipped: ClippedGrad, params: PyTree, batch: PyTree, *, memory: int, at_most: int = 4096) -> int:
    """Find the largest micro-batch, a power of two, whose clipped gradients fit into a stated memory.

    Sizes are doubled from 1 and run, once each, until one needs more than `memory`. What is measured is one
    `clipped.add` to a long sum: the sum in float64, the micro-batch, and all that is computed; the parameters and what
    else the process holds are not counted. On a CPU it is the resident set at its peak (Linux only), on CUDA that of
    PyTorch's allocator.

    Where memory is short, nothing is tried that might not fit: a size is run only if three times what half of it needed
    is free on the device, in the machine and in its control group, and the search ends with the size before
    otherwise. It ends so as well if an allocation fails. Other processes that take memory meanwhile are not foreseen.

    Args:
        clipped: what will run: `pegrad.clipped_grad(...)`, or a step's `clipped_grad`. Its own `microbatch_size` is
            left aside.
        params: pytree of floating-point tensors.
        batch: pytree of tensors with one leading axis `B >= 1`, like those to come; rows are repeated as needed.
        memory: bytes.
        at_most: the largest size to try, >= 1.

    Returns:
        A size, for `microbatch_size` or for the micro-batches of `DPSGD.accumulate`.

    Raises:
        ArgumentError: one example does not fit, a number is out of its bounds, or the system does not tell.
        LeafError, LossError: as `pegrad.clipped_grad`'s function.
    """
    check_size("memory", memory)
    check_size("at_most", at_most)
    leaves, spec, rows = trees.flatten_batch(batch)
    if rows == 0:
        raise ArgumentError("Expected batch to have at least one example to measure, got none")
    flat, params_spec = trees.flatten_params(params)
    device = flat[0].device
    whole = replace(clipped, microbatch_size=None)

    def add(size: int) -> None:
        index = torch.arange(size) % rows
        part = trees.unflatten(spec, [leaf[index.to(leaf.device)] for leaf in leaves])
        zeros = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in flat]
        sums = Sums(trees.unflatten(params_spec, zeros), tuple(leaf.dtype for leaf in flat), 0, FEW)
        with torch.no_grad():
            whole.add(sums, params, part)

    add(1)  # what is loaded at the first run is not of any size
    size, needed = 0, 0
    while 2 * size <= at_most and (size == 0 or _MARGIN * needed <= _free(device)):
        tried = 2 * size or 1
        try:
            needed = peak(partial(add, tried), device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        if needed > memory:
            break
        size = tried
    if size == 0:
        raise ArgumentError(f"Expected memory for at least one example, got memory={memory}: it needs {needed} bytes")
    return size


def peak(function: Callable[[], object], device: torch.device) -> int:
    """Call a function and return how many bytes it needed at its peak, beyond what was held before.

    Raises:
        ArgumentError: the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with suppress(AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed, and is still held, would hide what is needed
        (_PROC / "clear_refs").write_text("5")  # sets the high-water mark back
        before = _kilobytes(_PROC / "status", "VmRSS")
    except OSError:
        raise ArgumentError(
            f"This system does not tell how much memory a call on {device.type} needs: choose microbatch_size yourself"
        ) from None
    function()
    return max(0, _kilobytes(_PROC / "status", "VmHWM") - before) * 1024


def _free(device: torch.device) -> int:
    """Return how many bytes can be had on a device, without taking them from anyone."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024
    with suppress(OSError, ValueError):  # no control group, or one without a limit, which reads "max"
        used = int((_CGROUP / "memory.current").read_text())
        free = min(free, int((_CGROUP / "memory.max").read_text()) - used)
    return free


def _kilobytes(file: Path, field: str) -> int:
    lines = file.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
