"""What is noted of a recorded graph's nodes, and what their operations write to."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from pegrad.torch_internals import Operation, written

STAGE, KIN, LOOK, MEMORY = "stage", "kin", "look", "memory"
"""In a node's `meta`: the number of its stage; that it is one of several whose values are of one kind; its `Look`; and
the node that made the memory it lies in."""


class Look(NamedTuple):
    """What a tensor looks like."""

    shape: torch.Size
    device: str
    dtype: torch.dtype
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Look":
        """Look at a tensor."""
        return cls(tensor.shape, tensor.device.type, tensor.dtype, tensor.stride())


def written_by(node: Node) -> list[Any]:
    """Return the arguments that a node writes to."""
    if not isinstance(node.target, Operation):
        return []
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in written(node.target)]
