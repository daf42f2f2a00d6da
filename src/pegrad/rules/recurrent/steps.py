"""Recurrent networks as loops over their steps: slower, but made of operations that any transform knows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.recurrent.calls import (
    Sequences,
    States,
    Weights,
    is_packed,
    read_sequences,
    read_step,
    refuse_packed,
)
from pegrad.torch_internals import PACK, PAD

Cell = Callable[[Tensor, Tensor, States], States]
"""`(product of the input, product of the hidden state, states) -> next states`"""


def lstm_step(ih: Tensor, hh: Tensor, states: States) -> States:
    """One step of an LSTM, before the projection."""
    gate_in, forget, new, gate_out = (ih + hh).chunk(4, -1)
    cell = forget.sigmoid() * states[1] + gate_in.sigmoid() * new.tanh()
    return gate_out.sigmoid() * cell.tanh(), cell


def gru_step(ih: Tensor, hh: Tensor, states: States) -> States:
    """One step of a GRU; the reset gate weighs the hidden state's product, bias included."""
    (ih_reset, ih_update, ih_new), (hh_reset, hh_update, hh_new) = ih.chunk(3, -1), hh.chunk(3, -1)
    new = (ih_new + (ih_reset + hh_reset).sigmoid() * hh_new).tanh()
    return (new + (ih_update + hh_update).sigmoid() * (states[0] - new),)


def tanh_step(ih: Tensor, hh: Tensor, states: States) -> States:
    """One step of Elman's network."""
    return ((ih + hh).tanh(),)


def relu_step(ih: Tensor, hh: Tensor, states: States) -> States:
    """One step of Elman's network with rectifiers."""
    return ((ih + hh).relu(),)


SEQUENCES: dict[Any, Cell] = {
    torch.lstm: lstm_step,
    torch.gru: gru_step,
    torch.rnn_tanh: tanh_step,
    torch.rnn_relu: relu_step,
}
"""PyTorch's functions over whole sequences, and the step that each takes."""

CELLS: dict[Any, Cell] = {
    torch.lstm_cell: lstm_step,
    torch.gru_cell: gru_step,
    torch.rnn_tanh_cell: tanh_step,
    torch.rnn_relu_cell: relu_step,
}
"""PyTorch's functions of one step, and that step."""


def recur(cell: Cell, ih: Tensor, states: States, weights: Weights, backwards: bool) -> tuple[Tensor, States]:
    """Run one layer in one direction step by step.

    Args:
        cell: one step.
        ih: the product of the input, `(N, T, ·)`.
        states: the first states, `(N, ·)`.
        weights: of which only those of the hidden state are used.
        backwards: from the last step to the first.

    Returns:
        The output, `(N, T, p)`, and the last states.
    """
    outputs = []
    for step in reversed(ih.unbind(1)) if backwards else ih.unbind(1):
        states = _next(cell, step, states, weights)
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), states


def recur_packed(
    cell: Cell, ih: Tensor, sizes: list[int], states: States, weights: Weights, backwards: bool
) -> tuple[Tensor, States]:
    """Run one layer in one direction over packed sequences, the longest first.

    Args:
        cell: see `recur`.
        ih: the product of the input, step after step, `(sum(sizes), ·)`.
        sizes: how many sequences have a first step, a second, and so on.
        states: see `recur`.
        weights: see `recur`.
        backwards: from each sequence's own last step to the first.

    Returns:
        The output, `(sum(sizes), p)`, and each sequence's last states.
    """
    outputs = []
    if backwards:
        first, states = states, tuple(state[:0] for state in states)
        for step in reversed(ih.split(sizes)):
            joining = (start[len(state) : len(step)] for start, state in zip(first, states, strict=True))
            states = tuple(torch.cat(pair) for pair in zip(states, joining, strict=True))
            states = _next(cell, step, states, weights)
            outputs.append(states[0])
        return torch.cat(outputs[::-1]), states
    ended: list[States] = []
    for step in ih.split(sizes):
        ended.insert(0, tuple(state[len(step) :] for state in states))
        states = _next(cell, step, tuple(state[: len(step)] for state in states), weights)
        outputs.append(states[0])
    return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(states, *ended, strict=True))


def _next(cell: Cell, step: Tensor, states: States, weights: Weights) -> States:
    states = cell(step, F.linear(states[0], weights.hh, weights.bias_hh), states)
    return states if weights.hr is None else (F.linear(states[0], weights.hr), *states[1:])


def _by_steps(function: Callable[..., Any], cell: Cell) -> Callable[..., Any]:
    def layer(x: Tensor, states: States, weights: Weights, backwards: bool) -> tuple[Tensor, States]:
        return recur(cell, F.linear(x, weights.ih, weights.bias_ih), states, weights, backwards)

    def run(*args: Any, **kwargs: Any) -> Any:
        if is_packed(args):
            refuse_packed()
        call = read_sequences(*args, **kwargs)
        return call.run(layer) if has_steps(call) else function(*args, **kwargs)

    return run


def _packed_by_steps(function: Callable[..., Any], cell: Cell) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_packed(args):
            return function(*args, **kwargs)
        data, sizes, *rest = args
        rest.append(True)  # the axis of the sequences comes first, as there is no other

        def layer(x: Tensor, states: States, weights: Weights, backwards: bool) -> tuple[Tensor, States]:
            ih = F.linear(x, weights.ih, weights.bias_ih)
            return recur_packed(cell, ih, sizes.tolist(), states, weights, backwards)

        return read_sequences(data, *rest, **kwargs).run(layer)

    return run


def _pad_packed_sequence(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    sizes = batch_sizes.tolist()
    rows = [[0, 0] * (data.dim() - 1) + [0, sizes[0] - size] for size in sizes]
    steps = [F.pad(step, pad, value=padding_value) for step, pad in zip(data.split(sizes), rows, strict=True)]
    steps += [torch.full_like(steps[0], padding_value)] * (total_length - len(sizes))
    lengths = torch.tensor([sum(size > i for size in sizes) for i in range(sizes[0])])
    return torch.stack(steps, 1 if batch_first else 0), lengths


def has_steps(call: Sequences) -> bool:
    """Tell whether a call has any steps; if not, PyTorch shall refuse it."""
    return call.input.dim() == 3 and call.input.shape[1 if call.batch_first else 0] > 0


def _in_one_step(cell: Cell) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        call = read_step(*args, **kwargs)
        w = call.weights
        states = cell(F.linear(call.input, w.ih, w.bias_ih), F.linear(call.states[0], w.hh, w.bias_hh), call.states)
        return states if len(states) > 1 else states[0]

    return run


BY_STEPS: dict[Any, Callable[..., Any]] = {
    **{function: _by_steps(function, cell) for function, cell in SEQUENCES.items()},
    **{function: _in_one_step(cell) for function, cell in CELLS.items()},
    PACK: refuse_packed,
    PAD: refuse_packed,
}
"""PyTorch's recurrent functions, which have no batching rule, and what to call instead with the same arguments."""

PACKED_BY_STEPS: dict[Any, Callable[..., Any]] = {
    **{function: _packed_by_steps(function, cell) for function, cell in SEQUENCES.items()},
    PAD: _pad_packed_sequence,
}
"""The functions that take packed sequences under no transform, and what to call instead with the same arguments."""
