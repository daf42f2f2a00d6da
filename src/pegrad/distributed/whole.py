"""A parameter that is whole only while the loss needs it: parts are gathered on the way there, sums scattered back."""

from typing import Any

import torch
from torch import Tensor

from pegrad.distributed.groups import Group, Mesh, group_of
from pegrad.distributed.sharding import Rows
from pegrad.errors import ArgumentError, LossError
from pegrad.torch_internals import is_batched, is_tracked, transformed
from pegrad.tracing.lineage import isometry


def whole(part: Tensor, rows: int, mesh: Mesh = None) -> Tensor:
    """Make the whole of a tensor of which each rank has some rows, inside a loss; all ranks must call it equally often.

    It is for parameters that `data_parallel` was told not to gather: the loss gets this rank's rows, and the whole is
    there while it is used. An example's gradient is that at the whole, so norms are exact; the ranks' sums are added
    up and scattered on the way back.

    Args:
        part: this rank's rows of a parameter, as `shard` splits it.
        rows: how many rows there are on all ranks.
        mesh: the ranks, as for `data_parallel`.

    Returns:
        `(rows, ...)`.

    Raises:
        ArgumentError: the part has not the rows that it should have.
        LossError: the strategy is none of those that trace the loss, which alone see an example's whole gradient.

    Guarantee: gradients of examples on all ranks, their norms and their sums are those of whole parameters. Bound to
        `test_parameters_that_are_never_gathered_get_the_same_sums`.
    """
    group = group_of(mesh)
    here = Rows.of(torch.Size([rows, *part.shape[1:]]), group)
    if part.dim() == 0 or part.shape[0] != here.stop - here.start:
        raise ArgumentError(
            f"Expected part to have the {here.stop - here.start} of {rows} rows that rank {group.rank} of {group.size} "
            f"has, got shape {tuple(part.shape)}"
        )
    if is_tracked(part) or is_batched(part) or (part.requires_grad and not transformed()):
        raise LossError(
            "whole(...) needs a strategy that traces the loss, for no other sees an example's whole gradient: use "
            "strategy='auto', 'book_keeping' or 'ghost'"
        )
    found: Tensor = _Whole.apply(part, here, group)
    return found


@isometry
class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(part: Tensor, here: Rows, group: Group) -> Tensor:
        """Gather the parts."""
        return here.gather(group, part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the way back needs."""
        _, ctx.here, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Add up the ranks' sums, and take this rank's rows."""
        return ctx.here.scatter_sum(ctx.group, grad), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, part: Tensor, here: Rows, group: Group) -> tuple[Tensor, None]:
        """Run outside: a parameter is the same for all examples."""
        return _Whole.apply(part, here, group), None
