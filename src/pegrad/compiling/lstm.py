"""An LSTM's steps as a kernel of our own, in C++, where a compiler would go through hundreds of small operations.

It is compiled by what Inductor compiles its kernels with, when a graph first wants it: `lstm.cpp`.
"""

import copy
import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from pegrad.rules.recurrent.lstm import fake, fake_back, run, run_back
from pegrad.rules.recurrent.sweeps import track_of
from pegrad.torch_internals import cpp_library


def by_kernel(graph: GraphModule, tensors: Sequence[Tensor]) -> GraphModule:
    """Return a graph whose LSTMs run by the kernel, on a CPU.

    Args:
        graph: a recorded one, or a stage of it.
        tensors: what it is compiled for.

    Raises:
        Exception: the kernel cannot be compiled.
    """
    found = any(node.target in _COMPILED for node in graph.graph.nodes)
    if not found or any(t.device.type != "cpu" for t in tensors):
        return graph
    _library()
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.target = _COMPILED.get(node.target, node.target)
    graph.recompile()
    return graph


@torch.library.custom_op("pegrad::compiled_lstm", mutates_args=())
def compiled_lstm(ih: Tensor, bias: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool) -> list[Tensor]:
    """`pegrad::lstm`, by the kernel where that can: float32, and a multiple of so many hidden units as it takes."""
    if not _fits(ih, bias, h, c, hh):
        return run(ih, bias, h, c, hh, backwards)
    ih, bias, hh = ih.contiguous(), bias.contiguous(), hh.contiguous()
    (n, steps, _), size = ih.shape, c.shape[1]
    gates, squashed = ih.new_empty(steps, 4, n, size), ih.new_empty(steps, n, size)
    hidden, cell = (track_of(state, steps, backwards).transpose(0, 1) for state in (h, c))
    given = ih, bias, hh, gates, hidden, cell, squashed
    _library().lstm(*(t.data_ptr() for t in given), n, steps, size, backwards)
    return [gates, hidden, cell, squashed]


@torch.library.custom_op("pegrad::compiled_lstm_back", mutates_args=())
def compiled_lstm_back(
    gates: Tensor, cell: Tensor, squashed: Tensor, output: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool
) -> list[Tensor]:
    """`pegrad::lstm_back`, likewise."""
    if not _fits(gates, cell, squashed, output, h, c, hh):
        return run_back(gates, cell, squashed, output, h, c, hh, backwards)
    gates, cell, squashed, hh = gates.contiguous(), cell.contiguous(), squashed.contiguous(), hh.contiguous()
    output = output if output.stride(2) == 1 else output.contiguous()
    n, steps, size = output.shape
    grads = output.new_empty(n, steps, 4 * size)
    first = [state.clone(memory_format=torch.contiguous_format) for state in (h, c)]
    _library().lstm_back(
        *(t.data_ptr() for t in (gates, cell, squashed, output)),
        *output.stride()[:2],
        *(t.data_ptr() for t in (hh, grads, *first)),
        *(n, steps, size, backwards),
    )
    return [grads, *first]


compiled_lstm.register_fake(fake)
compiled_lstm_back.register_fake(fake_back)

_COMPILED = {
    torch.ops.pegrad.lstm.default: torch.ops.pegrad.compiled_lstm.default,
    torch.ops.pegrad.lstm_back.default: torch.ops.pegrad.compiled_lstm_back.default,
}


def _fits(*tensors: Tensor) -> bool:
    """Tell whether the kernel takes tensors, of which the last is the weight of the hidden state."""
    size = tensors[-1].shape[1]
    return size % _library().lstm_columns() == 0 and all(t.dtype is torch.float32 for t in tensors)


@cache
def _library() -> ctypes.CDLL:
    library = cpp_library(Path(__file__).with_name("lstm.cpp").read_text())
    library.lstm_columns.restype = ctypes.c_int64
    place, count = ctypes.c_void_p, ctypes.c_int64
    library.lstm.argtypes = [place] * 7 + [count] * 3 + [ctypes.c_bool]
    library.lstm_back.argtypes = [place] * 4 + [count] * 2 + [place] * 4 + [count] * 3 + [ctypes.c_bool]
    return library
