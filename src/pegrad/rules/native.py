"""Operations without parameters whose batching rule is slow or missing: run on the physical batch."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.site import Recorder, Rule


def attention(
    trace: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Rule of `F.scaled_dot_product_attention`, which on a CPU `vmap` would loop over."""
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if any(trace.is_parameter(t) for t in tensors):
        return NotImplemented
    axes = max(t.dim() for t in tensors)
    aligned = [t.reshape(*[1] * (axes - t.dim()), *t.shape) for t in tensors]

    def run(*physical: Tensor) -> Tensor:
        q, k, v, *mask = physical
        return F.scaled_dot_product_attention(
            q, k, v, mask[0] if mask else None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return trace.run(run, *aligned)


RULES: dict[Any, Rule] = {F.scaled_dot_product_attention: attention}
