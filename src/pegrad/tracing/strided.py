"""`torch.as_strided` reads memory as it lies, and `vmap` lets it read across examples: refused where it would."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pegrad.errors import StrategyError
from pegrad.tracing.batched import whole_rows


def _guarded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def guarded(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not whole_rows(input):
            raise StrategyError(
                f"The loss calls {function.__name__} on a tensor whose examples do not lie one after the other in "
                "memory, so it would read the numbers of other examples: make the batch's leaves contiguous "
                "(.contiguous()), use strategy='naive', or take the view by narrow, unfold or indexing"
            )
        return function(input, *args, **kwargs)

    return guarded


STRIDED: dict[Any, Any] = {f: _guarded(f) for f in (torch.as_strided, Tensor.as_strided, torch.as_strided_copy)}
"""Functions that read memory as it lies, and what to call instead with the same arguments."""
