"""Taps: what shows the gradient at an operation's output, in the backward pass, to whoever asked for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad.rules.site import Site

Receive = Callable[["Tapped", Tensor, Tensor], None]
"""`(tapped, x, g)`: called in the backward pass with a tapped operation's input and the gradient at its output."""


class Tapped(NamedTuple):
    """An operation whose output is tapped, and the sites that wait for the gradient there."""

    sites: list[Site]
    x: tuple[int, ...]
    y: tuple[int, ...]
    dtype: torch.dtype  # of x


class Line:
    """What taps send to: open for as long as a backward pass runs.

    Taps do not know the trace itself, which knows the graph, which knows the taps: such a circle would hold all
    activations until the next garbage collection.
    """

    def __init__(self) -> None:
        self._receive: Receive | None = None
        self.sent = False  # whether anything ever was

    @contextmanager
    def open(self, receive: Receive) -> Iterator[None]:
        """Inside the block, what is sent is received."""
        self._receive = receive
        try:
            yield
        finally:
            self._receive = None

    def send(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        """Pass on what a tapped operation has to tell."""
        if self._receive:
            self.sent = True
            self._receive(tapped, x, g)


class Sender(NamedTuple):
    """Sends what one operation has to tell: see `Send`."""

    anchor: Tensor
    line: Line
    tapped: Tapped

    def __call__(self, x: Tensor, g: Tensor) -> None:
        """See `Send`."""
        self.line.send(self.tapped, x, g)


class Tap(torch.autograd.Function):
    """The identity, in place; its backward sends on the gradient that passes.

    In place, so that the loss may go on to change the output in place itself. The anchor makes the output require a
    gradient also where the operation's input does not. `x` is saved as autograd saves it: if the loss changes it in
    place afterwards, the backward pass says so.
    """

    @classmethod
    def on(cls, y: Tensor, x: Tensor, send: Sender) -> Tensor:
        """Tap an output, physical, of an operation on physical tensors.

        That is `apply`, which would look for transforms of torch.func at length. None may run here: if one does,
        PyTorch raises an error.
        """
        return super(torch.autograd.Function, cls).apply(y, send.anchor, x, send)  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, send: Sender) -> Tensor:
        """Pass on the output."""
        ctx.mark_dirty(y)
        ctx.save_for_backward(x)
        ctx.send = send
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        """Send the gradient, and pass it on."""
        (x,) = ctx.saved_tensors
        ctx.send(x, g.detach())
        return g, None, None, None
