"""Whether a second backward pass, from weighted losses, brought each example's first gradient times its weight."""

from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative, on a norm; 1e-4 for wider numbers


class Proportion:
    """Compares two backward passes over one graph by the norms of what they bring, row by row.

    Backward functions are linear, so the passes differ by the weights alone. A user's `autograd.Function` need not be:
    one that clamps a gradient, or takes its sign, does not pass on a weight. Kept is one norm for each row and use.
    """

    def __init__(self) -> None:
        self._norms: dict[int, Tensor] = {}
        self._finite: Tensor | None = None
        self._off: Tensor | None = None

    def note(self, use: int, g: Tensor, rows: int) -> None:
        """Note what the first pass brought to a use: `g`, one or several rows an example, of `rows` examples."""
        norms = _row_norms(g, rows)
        finite = torch.isfinite(norms)
        self._norms[use] = norms
        self._finite = finite if self._finite is None else self._finite & finite

    def compare(self, use: int, g: Tensor, weights: Tensor) -> None:
        """Compare what the second pass brought to a use, the losses being weighted by `weights`, `(B,)`."""
        expected = self._norms[use] * weights.abs().to(self._norms[use].dtype)
        least = torch.finfo(g.dtype).tiny * (g.numel() / len(weights)) ** 0.5  # below it, a product may vanish
        off = (_row_norms(g, len(weights)) - expected).abs() > _TOLERANCE.get(g.dtype, 1e-4) * expected + least
        self._off = off if self._off is None else self._off | off

    def holds(self) -> bool:
        """Tell whether all that was compared agrees, examples apart whose gradients are not finite."""
        return self._off is None or self._finite is None or not bool((self._off & self._finite).any())


def _row_norms(g: Tensor, rows: int) -> Tensor:
    wide: Any = torch.promote_types(g.dtype, torch.float32)
    return torch.linalg.vector_norm(g.detach().reshape(rows, -1), dim=1, dtype=wide)
