"""Who takes part: every way to the clipped sum of a batch's gradients that a table compares, by its name there."""

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import torch

import native
import pegrad
from choices import GhostOnly, InstantiateOnly, PublishedRule
from jax_peers import jax_gradient, jax_privacy
from peers import backpack, opacus_ghost, opacus_hooks, opacus_per_layer
from pegrad.clipping import Automatic, Clipping, Flat, PerLayer, PerLeaf
from pegrad.strategies import Strategy
from pegrad.trees import PyTree
from workloads import Task, cross_entropies

Make = Callable[[Task, float], Callable[[], PyTree]]
"""`(task, clip norm) -> function`; the function's value is a pytree like the task's parameters."""


class Contestant(NamedTuple):
    """One line of a table."""

    make: Make
    family: str
    """`ours`: measured in every round; `stacking`, ours as well, and `peer`: in as many rounds as fit; `floor`: does
    not clip, so its value is not compared."""
    cpu_rows: Collection[str] | None = None
    """On a CPU it takes part in these workloads only: in others it would take minutes a call. None: in all."""
    torch_memory: bool = True
    """Whether PyTorch allocates its memory, and can tell on a GPU how much."""
    reference: str = "auto"
    """Whose answer its own should be."""


def native_gradient(task: Task, clip_norm: float) -> Callable[[], PyTree]:
    """The non-private gradient: of the summed loss, by autograd, on the whole batch at once."""
    module = task.module()
    images, labels = task.batch
    parameters = list(native.trained(module))

    def gradient() -> PyTree:
        loss = cross_entropies(module(images), labels).sum()
        return native.restored(task.params, iter(torch.autograd.grad(loss, parameters)))

    return gradient


def by_strategy(
    task: Task,
    clip_norm: float,
    strategy: str | Strategy,
    microbatch_size: int | None = None,
    clipping: Callable[[float], Clipping] = Flat,
) -> Callable[[], PyTree]:
    """`pegrad.clipped_grad`."""
    clipped = pegrad.clipped_grad(
        task.loss, clip_norm=clipping(clip_norm), strategy=strategy, microbatch_size=microbatch_size
    )
    return lambda: clipped(task.params, task.batch).grads


def _ours(strategy: str | Strategy) -> Contestant:
    return Contestant(partial(by_strategy, strategy=strategy), "ours")


def _clipping(clipping: Callable[[float], Clipping], reference: str, strategy: str = "auto") -> Contestant:
    return Contestant(partial(by_strategy, strategy=strategy, clipping=clipping), "ours", reference=reference)


def _stacking(strategy: str, microbatch_size: int | None = None) -> Contestant:
    return Contestant(partial(by_strategy, strategy=strategy, microbatch_size=microbatch_size), "stacking")


_JAX_CPU_ROWS = "tiny", "small_cnn", "vgg11"

BASELINE = "non-private"
REFERENCE = "auto"
CONTESTANTS: dict[str, Contestant] = {
    BASELINE: Contestant(native_gradient, "floor"),
    "auto": _ours("auto"),
    "book_keeping": _ours("book_keeping"),
    "ghost": _ours("ghost"),
    "grouped_conv": _stacking("grouped_conv"),
    "vmap": _stacking("vmap"),
    # One example at a time, summed as they come: a loop has no need of all gradients at once.
    "naive": _stacking("naive", microbatch_size=1),
    "Opacus": Contestant(opacus_hooks, "peer"),
    "Opacus ghost": Contestant(opacus_ghost, "peer"),
    "BackPACK": Contestant(backpack, "peer"),
    "JAX-Privacy": Contestant(jax_privacy, "peer", _JAX_CPU_ROWS, torch_memory=False),
    "JAX, non-private": Contestant(jax_gradient, "floor", _JAX_CPU_ROWS, torch_memory=False),
}
CHOICES: dict[str, Contestant] = {
    "ghost only": _ours(GhostOnly()),
    "instantiate only": _ours(InstantiateOnly()),
    "mixed, published rule": _ours(PublishedRule()),
}
"""Ghost clipping by other choices than ours; they take part in `mixed_ghost` alone."""

CLIPPINGS: dict[str, Contestant] = {
    "per leaf": _clipping(PerLeaf, "per leaf, ghost"),
    "per leaf, ghost": _clipping(PerLeaf, "per leaf", "ghost"),
    "per layer": _clipping(PerLayer, "per layer, ghost"),
    "per layer, ghost": _clipping(PerLayer, "per layer", "ghost"),
    "automatic": _clipping(Automatic, "automatic, ghost"),
    "automatic, ghost": _clipping(Automatic, "automatic", "ghost"),
    "Opacus per layer": Contestant(opacus_per_layer, "peer", reference="per leaf"),
}
"""Other clippings than one norm over all leaves, each compared with another way to the same; in `clipping` alone.

A clipping of another kind takes part once it has a line here.
"""

EVERYONE = CONTESTANTS | CHOICES | CLIPPINGS
