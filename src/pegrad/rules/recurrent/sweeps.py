"""One layer of a recurrent network over a whole sequence, forward and backward through time, written by hand.

All steps' gates lie in one array, where each step adds its product and applies its activations in place. On the way
back, whatever does not depend on the gradient is worked out for all steps at once, and turned into the gradient before
the activations step by step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegrad.rules.recurrent.calls import States, Weights
from pegrad.rules.site import Send


class Found(NamedTuple):
    """What the way back finds."""

    ih: Tensor
    """The gradient at the product of the input, `(N, T, ·)`."""
    states: States
    """The gradients at the first states, `(N, ·)`."""
    hidden: tuple[Tensor, Tensor]
    """What the weight of the hidden state met: its rows, and the gradients at its product, `(N, T, ·)`."""
    projected: tuple[Tensor, Tensor] | None = None
    """The same of the projection."""


class Sweep(ABC):
    """A kind of network, and its sweeps over N sequences of T steps: `(N, T, ·)` everywhere."""

    adds: ClassVar[bool] = True
    """Whether the products of input and hidden state are added first of all, so that one gradient is at both.

    Their biases then come as one, with `ih`.
    """

    @abstractmethod
    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """Run all steps.

        Args:
            ih: the product of the input, `(N, T, ·)`; no one else needs it, and it may be overwritten.
            states: the first states, `(N, ·)`.
            weights: of which only those of the hidden state are used.
            backwards: from the last step to the first.

        Returns:
            The output, the last states, and what `backward` wants saved: nothing that the caller could change.
        """

    @abstractmethod
    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """Run all steps back.

        Args:
            saved: what `forward` wanted saved.
            weights: as in `forward`.
            backwards: as in `forward`.
            output: the gradient at the output, `(N, T, p)`.
            states: the gradients at the last states, `(N, ·)`.
        """


class Elman(Sweep):
    """`h = activation(ih + W h)`."""

    def __init__(self, *, relu: bool) -> None:
        self._relu = relu

    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """See `Sweep.forward`."""
        steps = _order(ih, backwards)
        track = _track(states[0], ih.shape[1], backwards)
        past, now = _beside(track, backwards)
        now.copy_(ih)
        pasts, nows, hh = past.unbind(1), now.unbind(1), _transposed(weights.hh)
        activate = torch.relu_ if self._relu else torch.tanh_
        for t in steps:
            activate(nows[t].addmm_(pasts[t], hh))
        return now.clone(), (nows[steps[-1]].clone(),), (track,)

    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """See `Sweep.backward`."""
        past, now = _beside(saved[0], backwards)
        grads = (now > 0).to(now.dtype) if self._relu else 1 - now.square()
        parts = grads.unbind(1)
        (grad,) = states
        for t, inflow in _way_back(output, backwards):
            grad = grad + inflow
            grad = parts[t].mul_(grad) @ weights.hh
        return Found(grads, (grad,), (past, grads))


class GRU(Sweep):
    """`h = n + z (h - n)`, with gates r and z, and `n = tanh(ih + r (W h))`."""

    adds = False

    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """See `Sweep.forward`."""
        steps, size = _order(ih, backwards), ih.shape[2] // 3
        track = _track(states[0], ih.shape[1], backwards)
        past, now = _beside(track, backwards)
        gates = ih
        candidates = ih.new_empty(*ih.shape[:2], size)  # W h, as the reset gate meets it
        pasts, nows, hh = past.unbind(1), now.unbind(1), _transposed(weights.hh)
        both, resets, updates, news = (gates[..., a * size : b * size].unbind(1) for a, b in _GRU_GATES)
        kept = candidates.unbind(1)
        for t in steps:
            product = pasts[t] @ hh if weights.bias_hh is None else torch.addmm(weights.bias_hh, pasts[t], hh)
            kept[t].copy_(product[:, 2 * size :])
            both[t].add_(product[:, : 2 * size]).sigmoid_()
            news[t].addcmul_(resets[t], kept[t]).tanh_()
            torch.lerp(news[t], pasts[t], updates[t], out=nows[t])
        return now.clone(), (nows[steps[-1]].clone(),), (track, gates, candidates)

    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """See `Sweep.backward`."""
        track, gates, candidates = saved
        past, _ = _beside(track, backwards)
        reset, update, new = gates.chunk(3, -1)
        grads = torch.empty_like(gates)  # at the product of the hidden state
        at_reset, at_update, at_new = grads.chunk(3, -1)
        factor = (1 - new.square()).mul_(1 - update)
        torch.mul(factor, reset, out=at_new)
        torch.mul(candidates, at_new, out=at_reset).mul_(1 - reset)
        torch.sub(past, new, out=at_update).mul_(update).mul_(1 - update)
        parts, factors, updates = grads.unflatten(2, (3, -1)).unbind(1), factor.unbind(1), update.unbind(1)
        (grad,) = states
        for t, inflow in _way_back(output, backwards):
            grad = grad + inflow
            parts[t].mul_(grad[:, None])
            factors[t].mul_(grad)
            grad = (grad * updates[t]).addmm_(parts[t].flatten(1), weights.hh)
        ih = grads.clone()
        ih[..., -factor.shape[2] :] = factor
        return Found(ih, (grad,), (past, grads))


_GRU_GATES = ((0, 2), (0, 1), (1, 2), (2, 3))


class LSTM(Sweep):
    """`c = f c + i g` and `h = o tanh(c)`, projected or not, with gates i, f, o and the new cell g."""

    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """See `Sweep.forward`."""
        steps, size = _order(ih, backwards), ih.shape[2] // 4
        hidden, cell = (_track(state, ih.shape[1], backwards) for state in states)
        (past, now), (_, now_cell) = _beside(hidden, backwards), _beside(cell, backwards)
        whole = now if weights.hr is None else torch.empty_like(now_cell)  # the hidden state before its projection
        gates = ih
        pasts, nows, wholes = past.unbind(1), now.unbind(1), whole.unbind(1)
        hh, hr = _transposed(weights.hh), None if weights.hr is None else _transposed(weights.hr)
        now_cells, rows = now_cell.unbind(1), gates.unbind(1)
        both, ins, forgets, news, outs = (gates[..., a * size : b * size].unbind(1) for a, b in _LSTM_GATES)
        (state,) = states[1:]
        for t in steps:
            rows[t].addmm_(pasts[t], hh)
            both[t].sigmoid_()
            outs[t].sigmoid_()
            new = news[t].contiguous().tanh_()  # three times as fast as in its place among the gates
            news[t].copy_(new)
            state = (forgets[t] * state).addcmul_(ins[t], new)
            now_cells[t].copy_(state)
            torch.mul(state.tanh(), outs[t], out=wholes[t])
            if hr is not None:
                nows[t].copy_(wholes[t] @ hr)
        last = nows[steps[-1]].clone(), now_cells[steps[-1]].clone()
        return now.clone(), last, (gates, hidden, cell, *([] if weights.hr is None else [whole]))

    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """See `Sweep.backward`."""
        gates, hidden, cell, *whole = saved
        past, _ = _beside(hidden, backwards)
        past_cell, now_cell = _beside(cell, backwards)
        gate_in, forget, new, gate_out = gates.chunk(4, -1)
        grads = torch.empty_like(gates)
        at_in, at_forget, at_new, at_out = grads.chunk(4, -1)
        squashed = now_cell.tanh()
        _SIGMOID_BACK(new, gate_in, grad_input=at_in)
        _SIGMOID_BACK(past_cell, forget, grad_input=at_forget)
        _TANH_BACK(gate_in, new, grad_input=at_new)
        _SIGMOID_BACK(squashed, gate_out, grad_input=at_out)
        to_cell = _TANH_BACK(gate_out, squashed, grad_input=squashed)
        size = to_cell.shape[2]
        parts, to_cells, forgets = grads.unbind(1), to_cell.unbind(1), forget.unbind(1)
        by_cell, by_hidden = grads[..., : 3 * size].unflatten(2, (3, size)).unbind(1), at_out.unbind(1)
        projected = torch.empty_like(output, memory_format=torch.contiguous_format) if whole else None
        grad, grad_cell = states
        grad_cell = grad_cell.clone()
        for t, inflow in _way_back(output, backwards):
            grad = grad + inflow
            if projected is not None and weights.hr is not None:
                projected[:, t] = grad
                grad = grad @ weights.hr
            by_hidden[t].mul_(grad)
            grad_cell.addcmul_(grad, to_cells[t])
            by_cell[t].mul_(grad_cell[:, None])
            grad_cell.mul_(forgets[t])
            grad = parts[t] @ weights.hh
        return Found(grads, (grad, grad_cell), (past, grads), None if projected is None else (whole[0], projected))


_LSTM_GATES = ((0, 2), (0, 1), (1, 2), (2, 3), (3, 4))
# `(gradient, value)` to the gradient before the activation, each in one pass.
_SIGMOID_BACK, _TANH_BACK = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input


def _transposed(weight: Tensor) -> Tensor:
    """Transpose a weight in memory: small products with it, step after step, take half the time."""
    return weight.T.contiguous()


def _order(ih: Tensor, backwards: bool) -> list[int]:
    steps = list(range(ih.shape[1]))
    return steps[::-1] if backwards else steps


def _way_back(output: Tensor, backwards: bool) -> Iterable[tuple[int, Tensor]]:
    """Go through the steps, the one that ran last first, each with the gradient at its output."""
    inflows = output.unbind(1)
    return [(t, inflows[t]) for t in reversed(_order(output, backwards))]


def _track(first: Tensor, steps: int, backwards: bool) -> Tensor:
    """Make room for a state before and after every step, `(N, T + 1, ·)`, and enter the first."""
    track = first.new_empty(first.shape[0], steps + 1, first.shape[1])
    track[:, -1 if backwards else 0] = first
    return track


def _beside(track: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """Take the states before and after every step from a track, each `(N, T, ·)`."""
    return (track[:, 1:], track[:, :-1]) if backwards else (track[:, :-1], track[:, 1:])


class Swept(torch.autograd.Function):
    """A sweep over the N sequences of every example, that tells on its way back what its weights met.

    Called as `(sweep, weights, backwards, sends, anchor, x, ih, *states)` with weights and input detached, `x` and
    `ih` `(B, N, T, ·)`, states `(B, N, ·)`, and what to send to, or None: for the product of the input, for that of
    the hidden state, and for the projection; `(B, N T, ·)` is what they are sent. The anchor makes the output require
    a gradient also where neither `ih` nor the states do. It is not to be differentiated twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sweep: Sweep,
        weights: Weights,
        backwards: bool,
        sends: tuple[Send | None, Send | None, Send | None],
        anchor: Tensor | None,
        x: Tensor,
        ih: Tensor,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run forward."""
        first = tuple(state.flatten(0, 1) for state in states)
        output, last, saved = sweep.forward(ih.detach().flatten(0, 1), first, weights, backwards)
        ctx.sweep, ctx.backwards, ctx.sends = sweep, backwards, sends
        ctx.several = ih.shape[:2]
        ctx.shapes = [t.shape for t in (output, *last)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if sends[0] is None else x, weights.hh, weights.hr, *saved)
        # Not views, which a loss could not change in place.
        return tuple(torch.ops.aten._unsafe_view(t, (*ctx.several, *t.shape[1:])) for t in (output, *last))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Run back."""
        x, hh, hr, *saved = ctx.saved_tensors
        weights = Weights(hh, hh, hr=hr)
        output, *last = (
            hh.new_zeros(()).expand(shape) if g is None else g.flatten(0, 1)
            for g, shape in zip(grads, ctx.shapes, strict=True)
        )
        found = ctx.sweep.backward(tuple(saved), weights, ctx.backwards, output, tuple(last))
        batch = ctx.several[0]
        at_hidden = _by_batch(found.hidden[1], batch)
        at_input = at_hidden if ctx.sweep.adds else _by_batch(found.ih, batch)  # for `SharedGram`, the same tensor
        to_input, to_hidden, to_projection = ctx.sends
        if to_input is not None:
            to_input(_by_batch(x, batch), at_input)
        if to_hidden is not None:
            to_hidden(_by_batch(found.hidden[0], batch), at_hidden)
        if to_projection is not None and found.projected is not None:
            to_projection(*(_by_batch(t, batch) for t in found.projected))
        return *[None] * 6, *(t.unflatten(0, ctx.several) for t in (found.ih, *found.states))


def _by_batch(t: Tensor, batch: int) -> Tensor:
    """Take the steps of all sequences of an example for its positions: `(B, N T, ·)`."""
    return t.reshape(batch, -1, t.shape[-1])
