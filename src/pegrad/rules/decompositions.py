"""Operations rewritten into others that have rules, or that need none."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.embedding import embedding
from pegrad.rules.linear import linear
from pegrad.rules.site import Recorder, Rule


def embedding_bag(
    trace: Recorder,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Rule of `F.embedding_bag`: an embedding, then for each bag a sum of rows, or the largest numbers of them."""
    if input.dim() != (2 if offsets is None else 1) or (mode == "max" and offsets is not None):
        return NotImplemented
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != input.shape):
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or not input.numel() or mode not in ("sum", "mean", "max"):
        return NotImplemented
    tensors = (t for t in (input, weight, offsets, per_sample_weights) if t is not None)
    witness = next(t for t in tensors if trace.is_batched(t))
    rows = embedding(trace, input, weight, padding_idx)
    if rows is NotImplemented:
        table = trace.expand(weight, witness, "embedding_bag") if trace.is_parameter(weight) else weight
        rows = F.embedding(input, table, padding_idx)
    padding = None if padding_idx is None else input == padding_idx % weight.shape[0]
    if mode == "max":
        return _largest(rows, padding)
    if padding is not None:
        rows = rows.masked_fill(padding.unsqueeze(-1), 0)
    if per_sample_weights is not None:
        parameter = trace.is_parameter(per_sample_weights)
        factors = trace.expand(per_sample_weights, witness, "embedding_bag") if parameter else per_sample_weights
        rows = rows * factors.unsqueeze(-1)
    counted = torch.ones_like(input, dtype=rows.dtype) if padding is None else (~padding).to(rows.dtype)
    if offsets is None:
        y, numbers = rows.sum(1), counted.sum(1)
    else:
        bags = _membership(offsets[:-1] if include_last_offset else offsets, len(input)).to(rows.dtype)
        y, numbers = bags @ rows, bags @ counted
    return y if mode == "sum" else y / numbers.clamp(min=1).unsqueeze(1)


def _largest(rows: Tensor, padding: Tensor | None) -> Tensor:
    """Take the largest numbers of each bag, `(bags, size, d)` to `(bags, d)`; of nothing but padding, zero."""
    if padding is None:
        return rows.max(1).values
    found = rows.masked_fill(padding.unsqueeze(2), -torch.inf).max(1).values
    return found.masked_fill(padding.all(1).unsqueeze(1), 0)


def _membership(starts: Tensor, size: int) -> Tensor:
    """Tell which of `size` rows are in which bag, by where each bag starts: `(bags, size)`, boolean."""
    begun = torch.arange(size, device=starts.device) >= starts.unsqueeze(1)
    ended = torch.cat([begun[1:], torch.zeros_like(begun[:1])])
    return begun & ~ended


def bilinear(trace: Recorder, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Rule of `F.bilinear`: a linear map of whichever leaves the least between.

    Either of all products of a number of one input with one of the other; or of one input, to a matrix for each output,
    which the other input is then multiplied by.
    """
    witness = next((t for t in (input1, input2) if trace.is_batched(t)), None)
    if witness is None:
        return NotImplemented
    input1, input2 = (trace.expand(t, witness, "bilinear") if trace.is_parameter(t) else t for t in (input1, input2))
    out, left, right = weight.shape

    def of_both() -> Any:
        return linear(trace, (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight.flatten(1))

    def of_first() -> Any:
        rows = linear(trace, input1, weight.mT.flatten(0, 1))
        return rows if rows is NotImplemented else (rows.unflatten(-1, (out, right)) @ input2.unsqueeze(-1)).squeeze(-1)

    def of_second() -> Any:
        rows = linear(trace, input2, weight.flatten(0, 1))
        return rows if rows is NotImplemented else (rows.unflatten(-1, (out, left)) @ input1.unsqueeze(-1)).squeeze(-1)

    ways: list[tuple[int, Callable[[], Any]]] = [(left * right, of_both)]
    ways += [(out * right, of_first)] * trace.is_batched(input1) + [(out * left, of_second)] * trace.is_batched(input2)
    y = min(ways, key=lambda way: way[0])[1]()
    if y is NotImplemented:  # no parameter, or a parameter of no numbers
        matrices = trace.expand(weight, witness, "bilinear") if trace.is_parameter(weight) else weight
        y = torch.einsum("...i,oij,...j->...o", input1, matrices, input2)
    if bias is None:
        return y
    return y + (trace.expand(bias, y, "bilinear") if trace.is_parameter(bias) else bias)


def linear_cross_entropy(
    trace: Recorder,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Any:
    """Rule of `F.linear_cross_entropy`: a linear map, then cross entropy."""
    if any(trace.is_parameter(t) for t in (target, weight)):
        return NotImplemented
    classes = linear_weight.shape[:-1]  # and further axes of the target
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = linear(trace, input, linear_weight.flatten(0, -2), bias)
    if logits is NotImplemented:
        return logits
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(
        logits.unflatten(-1, classes), target, weight, reduction=reduction, ignore_index=ignored,
        label_smoothing=label_smoothing,
    )  # fmt: skip


RULES: dict[Any, Rule] = {F.embedding_bag: embedding_bag, torch.bilinear: bilinear}
if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    RULES[F.linear_cross_entropy] = linear_cross_entropy
