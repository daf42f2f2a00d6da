"""Operations whose batching rule is slow, missing or picks the wrong kernel: run in another way.

A parameter among their arguments is copied for each example.
"""

from collections.abc import Sequence
from typing import Any

import torch
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
    # Under `vmap` a mask does not seem to require a gradient, and a kernel that cannot give it one would be picked.
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    tensors = _copied(trace, tensors, "attention")
    axes = max(3, *(t.dim() for t in tensors))
    aligned = [t if t.dim() == axes else t.reshape(*[1] * (axes - t.dim()), *t.shape) for t in tensors]
    added = axes - max(t.dim() for t in tensors)

    def run(*physical: Tensor) -> Tensor:
        # The fast kernels take four axes: all before heads, positions and channels are one.
        shapes = {t.shape[:-3] for t in physical}
        leading = torch.broadcast_shapes(*shapes) if len(shapes) > 1 else shapes.pop()
        q, k, v, *mask = (_one_axis(t, leading) for t in physical)
        y = F.scaled_dot_product_attention(
            q, k, v, mask[0] if mask else None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return y.unflatten(0, leading) if len(leading) > 1 else y

    y = trace.run(run, *aligned)
    return y.flatten(0, added) if added else y


def _one_axis(t: Tensor, leading: torch.Size) -> Tensor:
    """Make one axis of all before the last three, expanded to a shape."""
    if t.shape[:-3] != leading:
        t = t.expand(*leading, *t.shape[-3:])
    return t.flatten(0, -4) if len(leading) > 1 else t


def column_stack(trace: Recorder, tensors: Sequence[Tensor]) -> Tensor:
    """Rule of `torch.column_stack`."""
    return torch.cat([t if t.dim() > 1 else t.reshape(-1, 1) for t in _copied(trace, tensors, "column_stack")], 1)


def _copied(trace: Recorder, tensors: Sequence[Tensor], operation: str) -> list[Tensor]:
    """Give each example a copy of the parameters among tensors, of which at least one is batched."""
    witness = next(t for t in tensors if trace.is_batched(t))
    return [trace.expand(t, witness, operation) if trace.is_parameter(t) else t for t in tensors]


RULES: dict[Any, Rule] = {F.scaled_dot_product_attention: attention, torch.column_stack: column_stack}
