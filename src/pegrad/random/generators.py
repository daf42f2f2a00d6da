"""Torch's own generators, run from a key: for dropout and the like, never for noise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pegrad import trees
from pegrad.random.keys import derive_for


@contextmanager
def torch_generators(key: Tensor, tree: trees.PyTree = None) -> Iterator[None]:
    """Run torch's own random functions (dropout, say) from a key, and leave torch's generators as they were.

    Torch's generators are fast and not made for privacy: never draw noise from them. Their seed is derived for this
    purpose alone, so what they give tells nothing of what else is drawn with the key.

    Args:
        key: the key, `uint8` of shape (32,).
        tree: a pytree of tensors; the generators of their devices are meant, beside that of the CPU.

    Raises:
        ArgumentError: `key` is not a key.
    """
    seed = int.from_bytes(derive_for(key, b"pegrad torch")[:8], "little")
    devices = {leaf.device for leaf in trees.leaves(tree)} - {torch.device("cpu"), torch.device("meta")}
    kind = next((device.type for device in devices), "cpu")
    indices = [device.index for device in devices]
    with torch.random.fork_rng(indices, device_type=kind):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices that are not forked
        for index in indices:
            with torch.accelerator.device_index(index):
                torch.get_device_module(kind).manual_seed(seed)
        yield
