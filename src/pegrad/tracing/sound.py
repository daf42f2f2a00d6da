"""Operations whose batching rule is missing, or wrong in plain autograd around `vmap`, in terms of others."""

from typing import Any

import torch
from torch import Tensor


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`torch.select_scatter`. PyTorch's rule gives `src` twice the gradient."""
    index = index + input.shape[dim] if index < 0 else index
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index, index + 1)


def setitem_(target: Tensor, index: Any, value: Any) -> None:
    """`target[index] = value`. PyTorch has no rule for a mask, which picks as many numbers as it likes."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and (not isinstance(value, Tensor) or value.dim() == 0):
        mask = index.reshape(*index.shape, *[1] * (target.dim() - index.dim()))
        target.copy_(torch.where(mask, value, target))
    else:
        target[index] = value


SOUND: dict[Any, Any] = {
    torch.select_scatter: select_scatter,
    Tensor.select_scatter: select_scatter,
    Tensor.__setitem__: setitem_,
}
"""Functions, and what to call instead with the same arguments on batched tensors."""
