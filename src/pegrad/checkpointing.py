"""Save memory: forget what a function computed, and run it again when the backward pass asks for it."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pegrad import trees
from pegrad.errors import LossError
from pegrad.torch_internals import differentiated, function_modes
from pegrad.tracing.batched import physical
from pegrad.tracing.journal import Journal
from pegrad.tracing.surroundings import Surroundings
from pegrad.tracing.trace import Trace


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and keep none of what it computes for the backward pass: there it runs again.

    `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` for a loss of one example. That one runs again when
    nobody knows any more which tensor belongs to which example, nor which weights `functional_call` gave to the module:
    even in plain PyTorch it then differentiates the module's own.

    Under `ghost`, `book_keeping` and `auto`, and in plain PyTorch, memory is saved; least by `book_keeping` where the
    clipped sum is asked for, which keeps what the weight gradients are made of. Where a transform of `torch.func`
    differentiates (`naive`, `vmap`, `grouped_conv`), PyTorch lets nothing be forgotten, and the function just runs.

    Hugging Face: `model.gradient_checkpointing_enable()`, and then
    `model._set_gradient_checkpointing(gradient_checkpointing_func=pegrad.checkpoint)`.

    Args:
        function: a pure function; what it closes over counts, and so do the modules that it calls.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        What the function returns.

    Raises:
        LossError: in the backward pass, if the function does otherwise there, or an argument was changed in place.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".

    >>> import pegrad, torch
    >>> def loss(w, x):
    ...     return pegrad.checkpoint(lambda h: (h @ w).sin().exp().square(), x).sum()
    >>> pegrad.per_example_grad(loss)(torch.zeros(2, 2), torch.eye(2))
    tensor([[[2., 2.],
             [0., 0.]],
    <BLANKLINE>
            [[0., 0.],
             [2., 2.]]])
    """
    if differentiated() or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return _Checkpoint(function, args, kwargs).run()


class _Holder:
    """Takes the place of one tensor that a graph would save."""

    value: Tensor | None = None


class _Checkpoint:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = lambda: function(*args, **kwargs)
        self._surroundings = Surroundings(function, args, kwargs)
        self._inputs = [physical(t) for t in trees.leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._versions = [t._version for t in self._inputs]
        self._holders: list[weakref.ref[_Holder]] = []
        self._complete = False
        self._journals = [(weakref.ref(trace), Journal()) for trace in _traces()]

    def run(self) -> Any:
        """Run the function for the first time."""
        with ExitStack() as stack:
            for trace, journal in self._journals:
                stack.enter_context(_open(trace, journal))
            stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            value = self._call()
        self._complete = True
        return value

    def _pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder()
        self._holders.append(weakref.ref(holder))  # held by the graph alone: what it lets go is not computed again
        return holder

    def _unpack(self, holder: _Holder) -> Tensor:
        if holder.value is None:
            self._run_again()
        value, holder.value = holder.value, None
        assert value is not None
        return value

    def _run_again(self) -> None:
        if self._versions != [t._version for t in self._inputs]:
            raise LossError(
                "The loss changes an argument of pegrad.checkpoint in place, which the backward pass still needs: make "
                "a new tensor (a = a * b in place of a.mul_(b))"
            )
        saved = 0

        def refill(tensor: Tensor) -> Tensor:  # raises nothing: an operator would make an error of its own of that
            nonlocal saved
            tensor = tensor.detach()  # an output that its own graph saved would be a circle
            holder = self._holders[saved]() if saved < len(self._holders) else None
            if holder is not None:
                holder.value = tensor
            saved += 1
            return tensor

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._surroundings.restored())
            for trace, journal in self._journals:
                stack.enter_context(journal.again())
                stack.enter_context(_open(trace, journal))
            stack.enter_context(saved_tensors_hooks(refill, lambda tensor: tensor))
            self._call()
        if self._complete and saved != len(self._holders):  # the function itself may ask for a gradient on its way
            raise LossError(
                "What pegrad.checkpoint runs again in the backward pass does not do what it did in the forward pass: "
                "it must be a pure function, and take no other path the second time"
            )


def _traces() -> list[Trace]:
    return [mode for mode in function_modes() if isinstance(mode, Trace)]


@contextmanager
def _open(reference: weakref.ref[Trace], journal: Journal) -> Iterator[None]:
    trace = reference()
    assert trace is not None, "a backward pass holds its trace"
    trace.journals.append(journal)
    try:
        yield
    finally:
        trace.journals.pop()
