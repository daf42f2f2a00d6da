"""An LSTM's layer over a whole sequence, forward and backward through time, written by hand.

Gates are i, f, g, o: `(T, 4, N, H)`, so that all that a step does runs over contiguous memory.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pegrad import assumptions
from pegrad.rules.recurrent.calls import States, Weights
from pegrad.rules.recurrent.sweeps import (
    Found,
    Sweep,
    beside,
    copied,
    order_of,
    track_of,
    transposed,
    way_back,
)


class LSTM(Sweep):
    """`c = f c + i g` and `h = o tanh(c)`, projected or not, with gates i, f, o and the new cell g."""

    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """See `Sweep.forward`."""
        h, c = states
        bias = ih.new_zeros(ih.shape[2]) if weights.bias_ih is None else weights.bias_ih
        steps: Steps = lstm if _is_one_operation(weights) else partial(run, hr=weights.hr)
        found = steps(ih, bias, h, c, weights.hh, backwards)
        _, hidden, cell, *_ = found
        _, now = beside(hidden.transpose(0, 1), backwards)
        last = 0 if backwards else -1
        return copied(now), (hidden[last].clone(), cell[last].clone()), tuple(found)

    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """See `Sweep.backward`."""
        gates, hidden, cell, squashed, *whole = saved
        h, c = states
        steps: Steps = lstm_back if _is_one_operation(weights) else partial(run_back, hr=weights.hr)
        grads, *first = steps(gates, cell, squashed, output, h, c, weights.hh, backwards)
        projected = (whole[0].transpose(0, 1), first.pop()) if whole else None
        past, _ = beside(hidden.transpose(0, 1), backwards)
        return Found(grads, tuple(first), (past, grads), projected)


Steps = Callable[..., list[Tensor]]


def _is_one_operation(weights: Weights) -> bool:
    """Tell whether a layer is to be one operation: in a graph, without a projection."""
    return weights.hr is None and assumptions.current() is not None


def run(
    ih: Tensor, bias: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool, hr: Tensor | None = None
) -> list[Tensor]:
    """Run all steps.

    Args:
        ih: the product of the input, `(N, T, 4H)`.
        bias: `(4H,)`.
        h: the first hidden state, `(N, p)`.
        c: the first cell, `(N, H)`.
        hh: the weight of the hidden state, `(4H, p)`.
        backwards: from the last step to the first.
        hr: the weight of a projection, `(p, H)`.

    Returns:
        The gates, `(T, 4, N, H)`; the hidden states and the cells before and after every step, `(T + 1, N, ·)`; tanh of
        the cells after every step, `(T, N, H)`; and, if there is a projection, what it projects, `(T, N, H)`. All are
        contiguous, and none is another's memory.
    """
    steps = order_of(ih, backwards)
    hidden, cell = (track_of(state, len(steps), backwards) for state in (h, c))
    (past, now), (past_cell, now_cell) = beside(hidden, backwards), beside(cell, backwards)
    gates = ih.new_empty(len(steps), 4, ih.shape[0], ih.shape[2] // 4).permute(1, 2, 0, 3)
    torch.add(_by_gate(ih), _by_gate(bias[None, None]), out=gates)
    squashed = torch.empty_like(gates[0])
    whole = now if hr is None else torch.empty_like(squashed)  # the hidden state before its projection
    weight = hh.unflatten(0, (4, -1)).mT.contiguous()
    projection = None if hr is None else transposed(hr)
    # The hidden state before a step, once for every gate.
    pasts, nows, wholes = past.expand(4, *past.shape).unbind(2), now.unbind(1), whole.unbind(1)
    past_cells, now_cells, tanhs = past_cell.unbind(1), now_cell.unbind(1), squashed.unbind(1)
    rows, both = gates.unbind(2), gates[:2].unbind(2)
    ins, forgets, news, outs = (gate.unbind(1) for gate in gates)
    for t in steps:
        rows[t].baddbmm_(pasts[t], weight)
        both[t].sigmoid_()
        news[t].tanh_()
        outs[t].sigmoid_()
        torch.mul(forgets[t], past_cells[t], out=now_cells[t]).addcmul_(ins[t], news[t])
        torch.tanh(now_cells[t], out=tanhs[t])
        torch.mul(tanhs[t], outs[t], out=wholes[t])
        if projection is not None:
            torch.mm(wholes[t], projection, out=nows[t])
    found = [gates.permute(2, 0, 1, 3), *(t.transpose(0, 1) for t in (hidden, cell, squashed))]
    return found if hr is None else [*found, whole.transpose(0, 1)]


def run_back(
    gates: Tensor,
    cell: Tensor,
    squashed: Tensor,
    output: Tensor,
    h: Tensor,
    c: Tensor,
    hh: Tensor,
    backwards: bool,
    hr: Tensor | None = None,
) -> list[Tensor]:
    """Run all steps back.

    Args:
        gates: as `run` returns them.
        cell: likewise.
        squashed: likewise.
        output: the gradient at the output, `(N, T, p)`.
        h: the gradient at the last hidden state, `(N, p)`.
        c: the gradient at the last cell, `(N, H)`.
        hh: see `run`.
        backwards: see `run`.
        hr: see `run`.

    Returns:
        The gradients at the products of input and hidden state, `(N, T, 4H)`, and at the first states; and, if there is
        a projection, at its outcome, `(N, T, p)`. All are contiguous, and none is another's memory.
    """
    past_cell, _ = beside(cell.transpose(0, 1), backwards)
    squashed = squashed.transpose(0, 1)
    gate_in, forget, new, gate_out = by_gate = gates.permute(1, 2, 0, 3)
    factors = torch.empty_like(by_gate)
    _SIGMOID_BACK(new, gate_in, grad_input=factors[0])
    _SIGMOID_BACK(past_cell, forget, grad_input=factors[1])
    _TANH_BACK(gate_in, new, grad_input=factors[2])
    _SIGMOID_BACK(squashed, gate_out, grad_input=factors[3])
    to_cells = _TANH_BACK(gate_out, squashed, grad_input=torch.empty_like(squashed)).unbind(1)
    by_cell, by_hidden, forgets = factors[:3].unbind(2), factors[3].unbind(1), forget.unbind(1)
    grads = gates.new_empty(*output.shape[:2], hh.shape[0])
    rows, at_gates = grads.unbind(1), _by_gate(grads)
    at_cell, at_out = at_gates[:3].unbind(2), at_gates[3].unbind(1)
    projected = None if hr is None else torch.empty_like(output, memory_format=torch.contiguous_format)
    grad, way = way_back(h, output, backwards)
    grad_cell = c.clone()
    for t, inflow in way:
        if projected is not None and hr is not None:
            projected[:, t] = grad
            grad = grad @ hr
        torch.mul(by_hidden[t], grad, out=at_out[t])
        grad_cell.addcmul_(grad, to_cells[t])
        torch.mul(by_cell[t], grad_cell, out=at_cell[t])
        grad_cell.mul_(forgets[t])
        grad = torch.addmm(inflow, rows[t], hh)
    return [grads, grad, grad_cell, *([] if projected is None else [projected])]


@torch.library.custom_op("pegrad::lstm", mutates_args=())
def lstm(ih: Tensor, bias: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool) -> list[Tensor]:
    """`run`, as one operation of a graph, for which a compiler may have a kernel."""
    return run(ih, bias, h, c, hh, backwards)


@lstm.register_fake
def fake(ih: Tensor, bias: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool) -> list[Tensor]:
    """Make tensors like those that `lstm` returns."""
    (n, steps, _), size = ih.shape, c.shape[1]
    shapes = (steps, 4, n, size), (steps + 1, n, size), (steps + 1, n, size), (steps, n, size)
    return [ih.new_empty(shape) for shape in shapes]


@torch.library.custom_op("pegrad::lstm_back", mutates_args=())
def lstm_back(
    gates: Tensor, cell: Tensor, squashed: Tensor, output: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool
) -> list[Tensor]:
    """`run_back`, as one operation of a graph, for which a compiler may have a kernel."""
    return run_back(gates, cell, squashed, output, h, c, hh, backwards)


@lstm_back.register_fake
def fake_back(
    gates: Tensor, cell: Tensor, squashed: Tensor, output: Tensor, h: Tensor, c: Tensor, hh: Tensor, backwards: bool
) -> list[Tensor]:
    """Make tensors like those that `lstm_back` returns."""
    return [gates.new_empty(shape) for shape in ((*output.shape[:2], len(hh)), h.shape, c.shape)]


# `(gradient, value)` to the gradient before the activation, each in one pass.
_SIGMOID_BACK, _TANH_BACK = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input


def _by_gate(rows: Tensor) -> Tensor:
    """View `(N, T, 4H)` as `(4, N, T, H)`."""
    return rows.unflatten(2, (4, -1)).movedim(2, 0)
