"""The size of a micro-batch that fits: what is measured, and that the search ends before memory does."""

import sys

import pytest
import torch

import pegrad
from pegrad import memory

MB = 2**20
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a call on a CPU")


def wide(params, x):
    return (torch.outer(x, params)).square().sum()  # 4 bytes times the product of both lengths


CLIPPED = pegrad.clipped_grad(wide, clip_norm=1.0, strategy="vmap")
PARAMS, BATCH = torch.ones(1000), torch.ones(3, 1000)
SMALL = torch.ones(4), torch.ones(3, 4)


@pytest.fixture
def sized(monkeypatch):
    """Let an example need 10 bytes more than the last, and note the sizes that were run."""
    tried: list[int] = []
    add = pegrad.ClippedGrad.add

    def watch(self, sums, params, batch, mask=None):
        tried.append(len(batch))
        return add(self, sums, params, batch, mask)

    def peak(function, device):
        function()
        return 100 + 10 * tried[-1]

    monkeypatch.setattr(pegrad.ClippedGrad, "add", watch)
    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(memory, "_free", lambda device: 10**9)
    return tried


@pytest.mark.parametrize(("budget", "size"), [(110, 1), (139, 2), (140, 4), (100 + 640, 64), (100 + 1279, 64)])
def test_the_largest_power_of_two_that_fits(sized, budget, size):
    """Catches: the first size that does not fit; a size that was never run."""
    assert pegrad.largest_microbatch(CLIPPED, *SMALL, memory=budget) == size
    assert sized == [1, *(2**k for k in range(size.bit_length() + 1))]


def test_no_size_beyond_the_largest_asked_for(sized):
    """Catches: a search without an end where memory is plenty."""
    assert pegrad.largest_microbatch(CLIPPED, *SMALL, memory=10**9, at_most=24) == 16
    assert max(sized) == 16


def test_what_is_not_free_is_not_tried(sized, monkeypatch):
    """Catches: a run that the system ends for want of memory."""
    monkeypatch.setattr(memory, "_free", lambda device: 3 * (100 + 80) + 5)
    assert pegrad.largest_microbatch(CLIPPED, *SMALL, memory=10**9) == 16
    assert max(sized) == 16


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_an_allocation_that_fails_ends_the_search(sized, monkeypatch, error):
    """Catches: an error where an answer is known already."""
    measure = memory.peak

    def failing(function, device):
        if sized[-1] == 4:
            raise error
        return measure(function, device)

    monkeypatch.setattr(memory, "peak", failing)
    assert pegrad.largest_microbatch(CLIPPED, *SMALL, memory=10**9) == 4


def test_other_errors_are_passed_on(monkeypatch):
    """Catches: a mistake in the loss that is taken for a want of memory."""
    with pytest.raises(pegrad.LossError):
        pegrad.largest_microbatch(pegrad.clipped_grad(lambda p, x: p * x, clip_norm=1.0), PARAMS, BATCH, memory=MB)


@linux
def test_what_is_measured_is_what_is_needed():
    """Catches: memory that was freed before and hides what is needed, kilobytes for bytes, an earlier peak."""
    torch.ones(50 * MB)  # a peak before
    for size in (16, 64):
        found = memory.peak(lambda size=size: torch.ones(size * MB // 4).sum(), torch.device("cpu"))
        assert (size - 1) * MB <= found <= (size + 8) * MB


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=linux), pytest.param("cuda", marks=cuda)])
def test_the_size_found_fits(device):
    """Catches: a measure of something else than the run; a size that the step cannot run."""
    params, batch = PARAMS.to(device), BATCH.to(device)
    size = pegrad.largest_microbatch(CLIPPED, params, batch, memory=100 * MB)
    assert 2 <= size <= 16  # 4 MB for each of a few intermediate values of an example
    assert pegrad.largest_microbatch(CLIPPED, params, batch, memory=400 * MB) > size
    pegrad.clipped_grad(wide, clip_norm=1.0, microbatch_size=size)(params, batch)


@linux
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 1000}, "memory for at least one example, got memory=1000: it needs"),
        ({"memory": 0}, "memory=0"),
        ({"memory": 1.5}, "memory=1.5"),
        ({"memory": MB, "at_most": 0}, "at_most=0"),
        ({"memory": MB, "batch": BATCH[:0]}, "at least one example"),
    ],
)
def test_arguments(changes, message):
    arguments = {"clipped": CLIPPED, "params": PARAMS, "batch": BATCH} | changes
    with pytest.raises(pegrad.ArgumentError, match=message):
        pegrad.largest_microbatch(**arguments)


def test_a_system_that_does_not_tell_is_an_error(monkeypatch, tmp_path):
    """Catches: a size from a peak of zero."""
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    with pytest.raises(pegrad.ArgumentError, match="does not tell"):
        memory.peak(lambda: None, torch.device("cpu"))


def test_a_control_group_limits_what_is_free(monkeypatch, tmp_path):
    """Catches: a container whose limit is below what the machine has free."""
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._free(torch.device("cpu")) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free(torch.device("cpu")) > 10**6
