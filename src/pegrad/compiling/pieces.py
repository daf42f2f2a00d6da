"""A pytree taken apart into its tensors and all else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pegrad import trees


@dataclass(frozen=True)
class Pieces:
    """A pytree without its tensors.

    Args:
        spec: its structure.
        others: for each leaf what it is, or for a tensor, that it is one.
    """

    spec: Any
    others: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> "tuple[Pieces, list[Tensor]]":
        """Take a pytree apart."""
        leaves, spec = trees.flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(spec, tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)), tensors

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Put tensors into their places."""
        given = iter(tensors)
        return trees.unflatten(self.spec, [next(given) if leaf is Tensor else leaf for leaf in self.others])
