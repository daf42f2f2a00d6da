"""One run of a loss over a batch, in which every use of a parameter is a site.

The loss runs once, under `vmap`. Where an operation that has a rule meets a parameter, the rule runs the native
operation on the physical batch and taps its output: in the backward pass the tap receives the loss's gradient at that
output, from which the rule knows everything else, and the parameter itself is no part of the graph. What the loss
makes of parameters alone stays unbatched, and is a parameter in turn. Where a parameter meets an operation without
a rule, each example gets a copy of it for that use; what autograd returns for the copies is the stacked gradient.

Every run is traced anew, so a loss may take another path each time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from pegrad import trees
from pegrad.rules.site import Rule, Site
from pegrad.tracing.batched import is_batched, on_physical_batch

Receive = Callable[["Tapped", Tensor, Tensor], None]
"""`(tapped, x, g)`: called in the backward pass with a tapped operation's input and the gradient at its output."""


@dataclass(frozen=True, eq=False)
class Tapped:
    """An operation whose output is tapped, and the sites that wait for the gradient there."""

    sites: list[Site]
    x: tuple[int, ...]
    y: tuple[int, ...]
    dtype: torch.dtype  # of x


@dataclass(frozen=True, eq=False)
class Copies:
    """A parameter of which each example has a copy, for operations that have no rule."""

    source: Tensor
    rows: Tensor  # (B, *source.shape), a leaf of the graph
    operation: str  # the first that met it


class Trace(TorchFunctionMode):
    """Run a loss over a batch and note the sites of its parameters.

    Args:
        loss: `(parameter leaves, example leaves) -> (scalar, aux leaves)`.
        params: the parameter leaves.
        batch: the batch's leaves, each `(B, ...)`, B >= 1.
        rules: for each function that has one, its rule.
        apart: indices of the leaves of which each example gets a copy from the start, whatever their uses.

    Attributes:
        params: the leaves that the loss was given: the parameters, cut off from any graph of the caller's.
        losses: `(B,)`, with the graph down to taps and copies.
        aux: the leaves of aux, each `(B, ...)`, detached.
        tapped: the operations that met parameters, in the order in which they ran.
        copies: the parameters of which each example has a copy.
    """

    def __init__(
        self,
        loss: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]],
        params: Sequence[Tensor],
        batch: Sequence[Tensor],
        rules: Mapping[Callable, Rule],
        apart: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.params = [leaf.detach().requires_grad_() for leaf in params]
        self.tapped: list[Tapped] = []
        self.copies: list[Copies] = []
        self._rules = rules
        self._leaves = {id(leaf) for leaf in self.params}
        self._copied: dict[int, Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._line = _Line()

        def traced(example: list[Tensor], copies: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
            with self:
                return loss([copies.get(i, leaf) for i, leaf in enumerate(self.params)], example)

        with torch.enable_grad():
            copies = {i: self._copy(self.params[i], batch[0].shape[0], "(all)") for i in apart}
            rows = [leaf.detach() for leaf in batch]
            self.losses, aux = vmap(traced, randomness="different")(rows, copies)
        self.aux = [leaf.detach() for leaf in aux]

    def backward(self, weights: Tensor, receive: Receive, *, last: bool = True) -> tuple[list[Tensor], list[bool]]:
        """Run the backward pass from the weighted losses, down to taps and copies only.

        Args:
            weights: `(B,)`.
            receive: called for every tapped operation that the loss depends on.
            last: whether the graph may be freed.

        Returns:
            For each of `copies`, the stacked gradient `(B, *source.shape)`; for each of `params`, whether the loss
            depends on it past all taps and copies, in which case what was received is not the whole gradient.
        """
        if not self.losses.requires_grad:
            return [torch.zeros_like(c.rows) for c in self.copies], [False] * len(self.params)
        rows = [c.rows for c in self.copies]
        inputs = [*rows, *self.params, self._anchor]
        with self._line.open(receive):
            grads = torch.autograd.grad(self.losses, inputs, weights, retain_graph=not last, allow_unused=True)
        stacked = [torch.zeros_like(r) if g is None else g for r, g in zip(rows, grads, strict=False)]
        return stacked, [g is not None for g in grads[len(rows) : -1]]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch in place of `func`."""
        kwargs = kwargs or {}
        tensors = [t for t in trees.leaves((args, kwargs)) if isinstance(t, Tensor)]
        parameters = [t for t in tensors if self.is_parameter(t)]
        witness = next((t for t in tensors if is_batched(t)), None)
        rule = self._rules.get(func)
        if rule is not None and witness is not None:
            result = rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if not parameters or witness is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        copied = {id(p): self.expand(p, witness, name) for p in parameters}

        def replace(argument: Any) -> Any:
            return copied.get(id(argument), argument)

        return func(*trees.map(replace, args), **trees.map(replace, kwargs))

    def is_parameter(self, tensor: Any) -> bool:
        """See `Recorder.is_parameter`."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or is_batched(tensor):
            return False
        return not tensor.is_leaf or id(tensor) in self._leaves

    def is_batched(self, tensor: Any) -> bool:
        """See `Recorder.is_batched`."""
        return isinstance(tensor, Tensor) and is_batched(tensor)

    def record(self, run: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `Recorder.record`."""
        return on_physical_batch(lambda x: run(x, self._tap), x)

    def run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """See `Recorder.run`."""
        return on_physical_batch(function, *tensors)

    def expand(self, parameter: Tensor, witness: Tensor, operation: str = "") -> Tensor:
        """See `Recorder.expand`."""
        if id(parameter) not in self._copied:  # `copies` keeps the parameter alive, so its id stays its own
            self._copied[id(parameter)] = on_physical_batch(
                lambda like: self._copy(parameter, like.shape[0], operation), witness
            )
        return self._copied[id(parameter)]

    def _copy(self, parameter: Tensor, batch: int, operation: str) -> Tensor:
        rows = parameter.detach().expand(batch, *parameter.shape).requires_grad_()
        self.copies.append(Copies(parameter, rows, operation))
        return rows

    def _tap(self, y: Tensor, x: Tensor, sites: list[Site]) -> Tensor:
        if not sites:
            return y
        if y._is_view():  # a tapped view would make every later in-place operation copy its gradient
            y = torch.ops.aten._unsafe_view(y, y.shape)
        tapped = Tapped(sites, tuple(x.shape), tuple(y.shape), x.dtype)
        self.tapped.append(tapped)
        return _Tap.apply(y, self._anchor, x.detach(), self._line, tapped)


class _Line:
    """What taps send to: open for as long as a backward pass runs.

    Taps do not know the trace itself, which knows the graph, which knows the taps: such a circle would hold all
    activations until the next garbage collection.
    """

    def __init__(self) -> None:
        self._receive: Receive | None = None

    @contextmanager
    def open(self, receive: Receive) -> Iterator[None]:
        self._receive = receive
        try:
            yield
        finally:
            self._receive = None

    def send(self, tapped: Tapped, x: Tensor, g: Tensor) -> None:
        if self._receive:
            self._receive(tapped, x, g)


class _Tap(torch.autograd.Function):
    """The identity, in place; its backward sends on the gradient that passes.

    In place, so that the loss may go on to change the output in place itself. The anchor makes the output require a
    gradient also where the operation's input does not. `x` is saved as autograd saves it: if the loss changes it in
    place afterwards, the backward pass says so.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, line: _Line, tapped: Tapped) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(x)
        ctx.line, ctx.tapped = line, tapped
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.line.send(ctx.tapped, x, g.detach())
        return g, None, None, None, None
