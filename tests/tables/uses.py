"""A use of an operation or a module as a loss: how its arguments become parameters and a batch of three rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

B = 3


@dataclass(frozen=True)
class Use:
    """A loss, its parameters and a batch of B rows, float64."""

    name: str
    loss: Callable[[Any, Any], Tensor]
    params: Any
    batch: Any


def weights() -> Tensor:
    """Give the rows of a batch something to differ by, where the operation's arguments do not: `(B,)`."""
    return torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)


def rows(t: Tensor, *, strided: bool) -> Tensor:
    """Make B examples of one tensor: `(B, *t.shape)`, float64 ones different from each other.

    Numbers only shrink, by up to 2%: probabilities stay probabilities, and signs stay. With `strided`, an example is
    not contiguous in memory.
    """
    t = t.detach()
    if t.is_floating_point():
        t = t.double()
    if t.is_floating_point() or t.is_complex():
        copies = [t * (1 - 0.01 * b * torch.rand(t.shape, dtype=torch.float64)) for b in range(B)]
    else:
        copies = [t] * B
    return torch.stack(copies, -1).movedim(-1, 0) if strided else torch.stack(copies)


def total(output: Any) -> Tensor:
    """Reduce whatever an operation returns to a scalar in which no two numbers play the same part."""
    value = torch.zeros((), dtype=torch.float64)
    for leaf in optree.tree_leaves(output, namespace="pegrad"):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            for part in [leaf.real, leaf.imag] if leaf.is_complex() else [leaf]:
                ramp = torch.linspace(1, 2, part.numel(), dtype=torch.float64).reshape(part.shape)
                value = value + (part.sin() * ramp).sum()
    return value


def is_floating(leaf: Any) -> bool:
    """Tell whether a leaf can be a parameter."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def are_dense(leaves: Iterable[Any]) -> bool:
    """Tell whether all tensors among leaves are ordinary ones."""
    return all(leaf.layout == torch.strided and not leaf.is_quantized for leaf in leaves if isinstance(leaf, Tensor))
