"""Operations whose batching rule is wrong in plain autograd around `vmap`, in terms of others whose rules are right."""

from typing import Any

import torch
from torch import Tensor


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`torch.select_scatter`. PyTorch's rule gives `src` twice the gradient."""
    index = index + input.shape[dim] if index < 0 else index
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index, index + 1)


SOUND: dict[Any, Any] = {torch.select_scatter: select_scatter, Tensor.select_scatter: select_scatter}
"""Functions, and what to call instead with the same arguments on batched tensors."""
