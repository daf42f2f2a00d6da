"""Pytrees in one place: optree's flattening, and checks whose errors name the leaf.

`torch.func` knows only torch's own pytree, which keeps dict insertion order and takes `None` for a leaf;
optree sorts dict keys and takes `None` for a node. So pegrad flattens with optree at its edge, hands plain
lists of tensors to `torch.func`, and unflattens at the end.

A mapping of any type is a node, like a dict: what a tokenizer returns (`BatchEncoding`), what a Hugging Face model
returns (`ModelOutput`), `UserDict`, a dict's subclass. Its type is registered when it is first met.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from threading import Lock
from typing import Any

import optree
from torch import Tensor, nn

from pegrad.errors import LeafError

NAMESPACE = "pegrad"

PyTree = Any


def flatten(tree: PyTree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Split a pytree into its leaves and the structure that `unflatten` puts them back into."""
    leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    while _register_mappings(leaves):  # the new nodes may hold others
        leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    return leaves, spec


def unflatten(spec: optree.PyTreeSpec, leaves: Iterable[Any]) -> PyTree:
    """Put leaves back into the structure that `flatten` returned."""
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: PyTree) -> list[Any]:
    """Return the leaves of a pytree, in flattening order."""
    return flatten(tree)[0]


def map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply a function leaf by leaf to pytrees of one structure."""
    leaves, spec = flatten(tree)
    columns = [leaves, *(spec.flatten_up_to(other) for other in rest)]
    return unflatten(spec, [fn(*column) for column in zip(*columns, strict=True)])


def paths(tree: PyTree) -> list[str]:
    """Return one readable path for each leaf, such as `['conv']['weight']`, in flattening order."""
    return [accessor.codify("") for accessor in flatten(tree)[1].accessors()]


def path(tree: PyTree, leaf: int) -> str:
    """Return the path of one leaf: for errors, for it costs as much as all of them."""
    return paths(tree)[leaf]


def flatten_params(params: PyTree) -> tuple[list[Tensor], optree.PyTreeSpec]:
    """Flatten parameters, having checked that every leaf can carry a gradient.

    Raises:
        LeafError: a leaf is not a tensor, not of a floating-point dtype, or an `nn.Parameter` that is frozen; or there
            is no leaf at all.
    """
    leaves, spec = flatten(params)
    if not leaves:
        raise LeafError("params has no leaves: expected a pytree with at least one floating-point tensor")
    for i, leaf in enumerate(leaves):
        _check_tensor("params", params, i, leaf)
        if not leaf.is_floating_point():
            raise LeafError(
                f"params{path(params, i)} has dtype {leaf.dtype}, which has no gradient: expected a floating-point "
                "tensor. Pass integer tensors in the batch, or close over them in the loss"
            )
        # The type first: asking for an instance takes long, and most leaves are plain.
        if type(leaf) is not Tensor and isinstance(leaf, nn.Parameter) and not leaf.requires_grad:
            raise LeafError(
                f"params{path(params, i)} is an nn.Parameter with requires_grad=False, but every leaf of params gets a "
                "gradient and noise. Pass only those to be trained, such as {name: p for name, p in "
                "module.named_parameters() if p.requires_grad}: torch.func.functional_call takes the others from "
                "the module. To train this one too, pass leaf.detach()"
            )
    return [_recordable(leaf) for leaf in leaves], spec


def flatten_batch(batch: PyTree) -> tuple[list[Tensor], optree.PyTreeSpec, int]:
    """Flatten a batch, having checked that its leaves agree on the leading axis.

    Returns:
        The leaves, the structure, and `B`.

    Raises:
        LeafError: a leaf is not a tensor, has no axis, or disagrees on `B`; or there is no leaf at all.
    """
    leaves, spec = flatten(batch)
    if not leaves:
        raise LeafError("batch has no leaves: expected a pytree of tensors with one leading batch axis")
    for i, leaf in enumerate(leaves):
        _check_tensor("batch", batch, i, leaf)
        if leaf.dim() == 0:
            raise LeafError(
                f"batch{path(batch, i)} is a scalar: expected a leading batch axis. Close over constants in the loss "
                "instead"
            )
    sizes = [leaf.shape[0] for leaf in leaves]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            names = paths(batch)
            raise LeafError(
                f"batch{names[i]} has {size} examples but batch{names[0]} has {sizes[0]}: "
                "every leaf needs the same leading axis. Close over what the examples share in the loss"
            )
    return [_recordable(leaf) for leaf in leaves], spec, sizes[0]


def _recordable(leaf: Tensor) -> Tensor:
    """Return a tensor that autograd may save: what inference mode made, it refuses."""
    return leaf.clone() if leaf.is_inference() else leaf


def _check_tensor(what: str, tree: PyTree, i: int, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise LeafError(
            f"{what}{path(tree, i)} is of type {type(leaf).__name__}: expected a torch.Tensor. "
            "Convert it (torch.as_tensor) or take it out of the pytree"
        )


def _register_mappings(leaves: list[Any]) -> bool:
    """Make nodes of the mappings that optree took for leaves; tell whether there were any."""
    found = [kind for kind in {type(leaf) for leaf in leaves} - _NO_MAPPINGS if issubclass(kind, Mapping)]
    for kind in found:
        with _LOCK:
            if kind not in _REGISTERED:
                _register(kind)
                _REGISTERED.add(kind)
    return bool(found)


_NO_MAPPINGS = {Tensor, nn.Parameter, bool, int, float, str}  # most leaves are one of these
_REGISTERED: set[type] = set()
_LOCK = Lock()


def _register(kind: type) -> None:
    def split(mapping: Any) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
        keys = tuple(optree.utils.total_order_sorted(mapping))  # as optree sorts the keys of a dict
        return [mapping[key] for key in keys], keys, keys

    def join(keys: Any, children: Iterable[Any]) -> Any:
        items = dict(zip(keys, children, strict=True))
        try:
            return kind(**items) if is_dataclass(kind) else kind(items)
        except Exception:  # a type that wants more than its items: the loss then sees a dict
            return items

    optree.register_pytree_node(kind, split, join, path_entry_type=optree.MappingEntry, namespace=NAMESPACE)
