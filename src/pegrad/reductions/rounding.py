"""How far rounding may have moved a row's norm, its share in a sum, and a sum: what is mistrusted is made again.

The model is that of `docs/rounding.md`: the errors of single operations are independent and of mean zero (Higham & Mary
2019), and each is at most half a unit in the last place of what the operation returns. The constants are above what
PyTorch's kernels were measured to do on data made to be unkind to them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pegrad.clipping.weights import Number

TOLERANCE = 2e-5
"""What a row's norm may be off by, relative to it or the clip norm; and its share, and a sum, relative to the bound."""

MANY_POSITIONS = 4096
"""From here on a row's share in a sum is computed by itself."""

_BY_ITSELF = 1e-3  # what such a row's share may be off by: in directions of its own, which no other row's adds to
_HOPELESS = 1e-5  # what a norm may be off by where float64 is the last resort


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half a unit in the last place, relative."""
    return torch.finfo(dtype).eps / 2


def sum_error(amplitude: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """Error of a sum of `positions` terms whose norms add up to at most `amplitude`, `(B,)`."""
    return unit_roundoff(dtype) * (0.5 + 0.2 * positions**0.5) * amplitude


def gram_error(terms: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """Error of a squared norm that was found from Gram matrices, given the sum of the terms' squared norms, `(B,)`."""
    # Products that vanish in float32 are lost as well, whatever they would have been multiplied by.
    return unit_roundoff(dtype) * (16 + 0.1 * positions) * terms.double()


def mistrusted_norms(squares: Tensor, errors: Tensor, floor: Number, positions: int) -> Tensor:
    """Mark the rows whose squared norm is off by more than is tolerated, or is no number: `(B,)`, boolean."""
    tolerance = 2 * (TOLERANCE if positions <= MANY_POSITIONS else _BY_ITSELF)
    return ~((errors <= tolerance * squares.clamp(min=floor**2)) & (squares < torch.inf))


def mistrusted_shares(weights: Tensor, errors: Tensor, bound: Number, positions: int) -> Tensor:
    """Mark the rows whose share in a sum has an error that is a part of the bound worth speaking of."""
    return weights * errors > (TOLERANCE if positions <= MANY_POSITIONS else _BY_ITSELF) * bound


def hopeless(norms: Tensor, errors: Tensor, floor: Number) -> Tensor:
    """Mark the rows that float64 does not save either."""
    return ~(errors <= _HOPELESS * norms.clamp(min=floor))


def mistrusted_sum(parts: Sequence[Number] | Tensor, terms: int, dtype: torch.dtype, bound: Number) -> Any:
    """Tell whether a sum, added up in parts, is so large somewhere that its last places matter.

    Args:
        parts: the largest number, by magnitude, of each part: numbers, or a tensor `(parts,)`.
        terms: how many terms were added for each number of a part.
        dtype: in which they were.
        bound: what one example may move the sum by.

    Returns:
        A boolean; of tensors, a boolean scalar.
    """
    total = parts.norm() if isinstance(parts, Tensor) else sum(part**2 for part in parts) ** 0.5
    error = 0.3 * unit_roundoff(dtype) * terms**0.5 * total
    trusted = error <= TOLERANCE * bound
    return ~trusted if isinstance(trusted, Tensor) else not trusted
