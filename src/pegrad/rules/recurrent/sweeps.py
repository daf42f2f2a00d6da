"""One layer of a recurrent network over a whole sequence, forward and backward through time, written by hand.

All steps' gates lie in one array, where each step adds its product and applies its activations in place. On the way
back, whatever does not depend on the gradient is worked out for all steps at once, and turned into the gradient before
the activations step by step. What one step reads and writes lies together in memory, wherever it is small.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegrad.rules.recurrent.calls import States, Weights
from pegrad.rules.site import Send
from pegrad.torch_internals import unsafe_view


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

    Their biases then come as one, that of the input.
    """

    @abstractmethod
    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """Run all steps.

        Args:
            ih: the product of the input, `(N, T, ·)`, without its bias; no one else needs it, and it may be
                overwritten.
            states: the first states, `(N, ·)`.
            weights: of which all but the input's are used, its bias included.
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
        steps = order_of(ih, backwards)
        track = track_of(states[0], ih.shape[1], backwards)
        past, now = beside(track, backwards)
        add_bias(ih, weights.bias_ih, now)
        pasts, nows, hh = past.unbind(1), now.unbind(1), transposed(weights.hh)
        activate = torch.relu_ if self._relu else torch.tanh_
        for t in steps:
            activate(nows[t].addmm_(pasts[t], hh))
        return copied(now), (nows[steps[-1]].clone(),), (track,)

    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """See `Sweep.backward`."""
        past, now = beside(saved[0], backwards)
        grads = (now > 0).to(now.dtype) if self._relu else 1 - now.square()
        parts = grads.unbind(1)
        grad, way = way_back(states[0], output, backwards)
        for t, inflow in way:
            grad = torch.addmm(inflow, parts[t].mul_(grad), weights.hh)
        return Found(grads, (grad,), (past, grads))


class GRU(Sweep):
    """`h = n + z (h - n)`, with gates r and z, and `n = tanh(ih + r (W h))`."""

    adds = False

    def forward(
        self, ih: Tensor, states: States, weights: Weights, backwards: bool
    ) -> tuple[Tensor, States, tuple[Tensor, ...]]:
        """See `Sweep.forward`."""
        steps, size = order_of(ih, backwards), ih.shape[2] // 3
        track = track_of(states[0], ih.shape[1], backwards)
        past, now = beside(track, backwards)
        gates = ih if weights.bias_ih is None else ih.add_(weights.bias_ih)
        candidates = ih.new_empty(*ih.shape[:2], size)  # W h, as the reset gate meets it
        pasts, nows, hh = past.unbind(1), now.unbind(1), transposed(weights.hh)
        both, resets, updates, news = (gates[..., a * size : b * size].unbind(1) for a, b in _GRU_GATES)
        kept = candidates.unbind(1)
        for t in steps:
            product = pasts[t] @ hh if weights.bias_hh is None else torch.addmm(weights.bias_hh, pasts[t], hh)
            kept[t].copy_(product[:, 2 * size :])
            both[t].add_(product[:, : 2 * size]).sigmoid_()
            news[t].addcmul_(resets[t], kept[t]).tanh_()
            torch.lerp(news[t], pasts[t], updates[t], out=nows[t])
        return copied(now), (nows[steps[-1]].clone(),), (track, gates, candidates)

    def backward(
        self, saved: tuple[Tensor, ...], weights: Weights, backwards: bool, output: Tensor, states: States
    ) -> Found:
        """See `Sweep.backward`."""
        track, gates, candidates = saved
        past, _ = beside(track, backwards)
        reset, update, new = gates.chunk(3, -1)
        grads = torch.empty_like(gates)  # at the product of the hidden state
        at_reset, at_update, at_new = grads.chunk(3, -1)
        factor = (1 - new.square()).mul_(1 - update)
        torch.mul(factor, reset, out=at_new)
        torch.mul(candidates, at_new, out=at_reset).mul_(1 - reset)
        torch.sub(past, new, out=at_update).mul_(update).mul_(1 - update)
        parts, factors, updates = grads.unflatten(2, (3, -1)).unbind(1), factor.unbind(1), update.unbind(1)
        grad, way = way_back(states[0], output, backwards)
        for t, inflow in way:
            parts[t].mul_(grad[:, None])
            factors[t].mul_(grad)
            grad = torch.addcmul(inflow, grad, updates[t]).addmm_(parts[t].flatten(1), weights.hh)
        ih = grads.clone()
        ih[..., -factor.shape[2] :] = factor
        return Found(ih, (grad,), (past, grads))


_GRU_GATES = ((0, 2), (0, 1), (1, 2), (2, 3))


def transposed(weight: Tensor) -> Tensor:
    """Transpose a weight in memory: small products with it, step after step, take half the time."""
    return weight.T.contiguous()


def order_of(ih: Tensor, backwards: bool) -> list[int]:
    """List the steps of `(N, T, ·)` in the order in which they run."""
    steps = list(range(ih.shape[1]))
    return steps[::-1] if backwards else steps


def way_back(last: Tensor, output: Tensor, backwards: bool) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
    """Find the gradient at the hidden state after the step that ran last, and go through the steps from there.

    Each comes with the gradient at the output of the one that ran before it, for a product to be added to; zeros come
    with the one that ran first.
    """
    inflows = output.unbind(1)
    way = order_of(output, backwards)[::-1]
    before = [*(inflows[t] for t in way[1:]), output.new_zeros(()).expand_as(last)]
    return last + inflows[way[0]], zip(way, before, strict=True)


def add_bias(product: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Add the bias, if there is one, and write to where the product is to lie, in one pass."""
    if bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)


def copied(states: Tensor) -> Tensor:
    """Copy the states after every step for the caller, contiguous as `(N, T, ·)`."""
    return states.clone(memory_format=torch.contiguous_format)


def track_of(first: Tensor, steps: int, backwards: bool) -> Tensor:
    """Make room for a state before and after every step, `(N, T + 1, ·)`, and enter the first.

    In memory steps come first, so that each step's states are contiguous.
    """
    track = first.new_empty(steps + 1, *first.shape).transpose(0, 1)
    track[:, -1 if backwards else 0] = first
    return track


def beside(track: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
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
        return tuple(unsafe_view(t, (*ctx.several, *t.shape[1:])) for t in (output, *last))

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
