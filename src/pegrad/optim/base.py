"""What an optimizer is: a pair of pure functions, and chains of such pairs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from pegrad import trees
from pegrad.errors import ArgumentError
from pegrad.trees import PyTree

State = Any


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turns gradients into other gradients, or into updates.

    Attributes:
        init: `params -> state`.
        update: `(grads, state, params) -> (updates, state)`; updates have the structure, shapes and dtypes of
            the gradients, which are those of the parameters.
    """

    init: Callable[[PyTree], State]
    update: Callable[[PyTree, State, PyTree], tuple[PyTree, State]]


Pair = (
    GradientTransformation | tuple[Callable[[PyTree], State], Callable[[PyTree, State, PyTree], tuple[PyTree, State]]]
)
"""A transformation, or a plain tuple `(init, update)`."""


def as_transformation(pair: Any) -> GradientTransformation:
    """Return a pair `(init, update)` of any kind as a transformation, whose update changes nothing in place.

    Args:
        pair: a transformation, TorchOpt's or ours, whatever it takes its parameters for; or a plain tuple.

    Raises:
        ArgumentError: it is no such pair.
    """
    if isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair)):
        pair = GradientTransformation(*pair)
    if not callable(getattr(pair, "init", None)) or not callable(getattr(pair, "update", None)):
        raise ArgumentError(
            f"Expected optimizer to have init and update, got {type(pair).__name__}: use pegrad.optim, TorchOpt's "
            "functional transformations or a pair of functions of your own; a torch.optim.Optimizer changes "
            "parameters in place: hand it what step.release returns"
        )
    if "inplace" in inspect.signature(pair.update).parameters:  # TorchOpt's default writes updates over the gradients
        return GradientTransformation(
            pair.init, lambda grads, state, params: pair.update(grads, state, params=params, inplace=False)
        )
    return GradientTransformation(pair.init, pair.update)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Return `params + updates`, leaf by leaf.

    Args:
        params: a pytree of floating-point tensors.
        updates: a pytree of the same structure and shapes.

    Returns:
        New parameters; each leaf keeps the dtype of the parameter it replaces.
    """
    return trees.map(lambda param, update: (param + update).to(param.dtype), params, updates)


def chain(*transformations: Pair) -> GradientTransformation:
    """Apply transformations one after the other, each to the updates of the one before it.

    Args:
        transformations: any number of them, or of plain pairs `(init, update)`; none at all leaves gradients as they
            are.

    Returns:
        Their composition, whose state is the tuple of theirs.

    Raises:
        ArgumentError: one is no pair of functions.
    """
    links = [as_transformation(transformation) for transformation in transformations]

    def init(params: PyTree) -> State:
        return tuple(link.init(params) for link in links)

    def update(grads: PyTree, state: State, params: PyTree) -> tuple[PyTree, State]:
        next_states = []
        for link, own_state in zip(links, state, strict=True):
            grads, own_state = link.update(grads, own_state, params)
            next_states.append(own_state)
        return grads, tuple(next_states)

    return GradientTransformation(init, update)
