"""Some parameters one way, others another: by a label for each, or by a mask."""

from collections.abc import Callable, Mapping
from typing import Any

import optree

from pegrad import trees
from pegrad.errors import ArgumentError, LeafError
from pegrad.optim.base import GradientTransformation, Pair, State, as_transformation, chain
from pegrad.trees import PyTree

Labels = PyTree | Callable[[PyTree], PyTree]
"""A pytree of labels, or a function from the parameters to one. It may be a prefix: a label holds for all below it."""


def partition(transformations: Mapping[str, Pair], labels: Labels) -> GradientTransformation:
    """Transform the gradients of each group of parameters in its own way.

    A group's transformation sees the whole structure, with None in place of the leaves of other groups; so what it
    measures over all leaves, such as a norm, it measures over its group.

    Args:
        transformations: by label, transformations or plain pairs `(init, update)`.
        labels: for each parameter leaf one of the labels: a pytree of strings of the parameters' structure, or of a
            prefix of it, in which a label holds for every leaf below it; or a function from the parameters to such a
            pytree.

    Returns:
        A transformation whose state is a dict: by label, the state of its transformation.

    Raises:
        ArgumentError: `transformations` is empty, or one of them is no pair of functions.
        LeafError: on a call, a leaf has a label that is none of those, or the labels do not fit the parameters.

    Source: `partition` of optax, once `multi_transform`.

    >>> from pegrad import optim
    >>> labels = {"conv": "still", "head": "moving"}
    >>> head_only = optim.partition({"moving": optim.adam(1e-3), "still": optim.sgd(0.0)}, labels)
    """
    if not isinstance(transformations, Mapping) or not transformations:
        raise ArgumentError(
            "Expected transformations to be a dict of at least one, by label, got "
            f"{'an empty one' if isinstance(transformations, Mapping) else type(transformations).__name__}."
        )
    return _partition({label: as_transformation(t) for label, t in transformations.items()}, labels, "label")


def masked(transformation: Pair, mask: Labels) -> GradientTransformation:
    """Transform the gradients of some parameters, and leave the others' as they are.

    Args:
        transformation: it, or a plain pair `(init, update)`. It sees None in place of the leaves that are left out.
        mask: which: a pytree of booleans of the parameters' structure, or of a prefix of it; or a function from the
            parameters to such a pytree.

    Returns:
        A transformation with the given one's state.

    Raises:
        ArgumentError: the transformation is no pair of functions.
        LeafError: on a call, the mask is not boolean, or does not fit the parameters.

    Source: `masked` of optax.

    >>> from pegrad import optim
    >>> no_decay_of_biases = optim.masked(optim.add_decayed_weights(0.1), {"weight": True, "bias": False})
    """
    whole = _partition({True: as_transformation(transformation), False: chain()}, mask, "mask")

    def init(params: PyTree) -> State:
        return whole.init(params)[True]

    def update(grads: PyTree, state: State, params: PyTree) -> tuple[PyTree, State]:
        updates, states = whole.update(grads, {True: state, False: ()}, params)
        return updates, states[True]

    return GradientTransformation(init, update)


def _partition(groups: Mapping[Any, GradientTransformation], labels: Labels, what: str) -> GradientTransformation:
    def init(params: PyTree) -> State:
        found = _leafwise(labels, params, groups, what)
        return {label: group.init(_only(params, found, label)) for label, group in groups.items()}

    def update(grads: PyTree, state: State, params: PyTree) -> tuple[PyTree, State]:
        found = _leafwise(labels, params, groups, what)
        parts, states = {}, {}
        for label, group in groups.items():
            own = (_only(grads, found, label), state[label], _only(params, found, label))
            updates, states[label] = group.update(*own)
            parts[label] = iter(trees.leaves(updates))
        return trees.unflatten(trees.flatten(grads)[1], [next(parts[label]) for label in found]), states

    return GradientTransformation(init, update)


def _only(tree: PyTree, labels: list[Any], label: Any) -> PyTree:
    """Put None in the place of the leaves with other labels."""
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [leaf if own == label else None for leaf, own in zip(leaves, labels, strict=True)])


def _leafwise(labels: Labels, params: PyTree, groups: Mapping[Any, GradientTransformation], what: str) -> list[Any]:
    """Return the label of each leaf.

    Raises:
        LeafError: labels that do not fit, or a label that is not expected.
    """
    trees.flatten(params)  # which makes nodes of mappings of any kind
    given = labels(params) if callable(labels) else labels
    trees.flatten(given)
    if errors := optree.prefix_errors(given, params, namespace=trees.NAMESPACE):
        why = " ".join(str(errors[0](f"{what}s")).split())
        raise LeafError(f"Expected {what}s of the parameters' structure, or of a prefix of it: {why}")
    found = optree.broadcast_prefix(given, params, namespace=trees.NAMESPACE)
    for i, label in enumerate(found):
        if not any(type(label) is type(known) and label == known for known in groups):
            raise LeafError(
                f"params{trees.path(params, i)} has {what} {label!r}: expected one of {', '.join(map(repr, groups))}"
            )
    return found
