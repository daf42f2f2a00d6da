"""One call of a per-example function: its arguments checked, flattened and split into chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from pegrad import trees
from pegrad.errors import LeafError, LossError
from pegrad.problem import Problem, Values
from pegrad.tracing.loss import FlatLoss
from pegrad.trees import PyTree


@dataclass(frozen=True)
class Call:
    """A loss, its parameters and a batch of at least one row.

    An empty batch becomes one row of zeros that the mask takes out again: what an empty batch must return, shapes
    and all, is then what a batch of padding returns.
    """

    problem: Problem
    loss: FlatLoss
    params: optree.PyTreeSpec
    size: int  # rows that the user gave
    versions: list[int]  # of parameters and batch, before the loss ran

    @classmethod
    def of(cls, loss: Any, params: PyTree, batch: PyTree, mask: Tensor | None) -> "Call":
        """Check and flatten the arguments of a call.

        Raises:
            LeafError: a leaf of the wrong type, dtype or leading axis, or a mask that is not boolean `(B,)`.
        """
        leaves, params_spec = trees.flatten_params(params)
        rows, batch_spec, size = trees.flatten_batch(batch)
        if mask is not None and not isinstance(mask, Tensor):
            raise LeafError(f"mask is of type {type(mask).__name__}: expected a boolean torch.Tensor ({size},) or None")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (size,)):
            raise LeafError(
                f"mask has dtype {mask.dtype} and shape {tuple(mask.shape)}: expected torch.bool and ({size},), "
                "True for examples and False for padding"
            )
        if size == 0:
            rows = [row.new_zeros(1, *row.shape[1:]) for row in rows]
            mask = torch.zeros(1, dtype=torch.bool, device=rows[0].device)
        mask = None if mask is None else mask.to(rows[0].device)  # a sampler draws on the CPU
        flat = FlatLoss(loss, params_spec, batch_spec)
        versions = [leaf._version for leaf in (*leaves, *rows)]
        return cls(Problem(flat, leaves, rows, mask, rows[0].shape[0]), flat, params_spec, size, versions)

    def chunks(self, size: int | None) -> Iterator[Problem]:
        """Split the rows into chunks of at most `size`; None: one chunk."""
        rows = self.problem.batch_size
        size = size or rows
        for start in range(0, rows, size):
            part = slice(start, start + size)
            mask = None if self.problem.mask is None else self.problem.mask[part]
            yield replace(self.problem, batch=[leaf[part] for leaf in self.problem.batch], mask=mask)

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the chunks' rows `(b, ...)`, padding set to zero: `(B, ...)`.

        Raises:
            LossError: as `check`.
        """
        self.check()
        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if self.problem.mask is not None:
            examples = self.problem.mask.reshape(-1, *[1] * (whole.dim() - 1))
            whole = torch.where(examples, whole, whole.new_zeros(()))  # unlike masked_fill, takes every dtype of aux
        return whole[: self.size]

    def check(self) -> None:
        """Check, once the loss has run, that it depends on its parameters and has changed neither them nor the batch.

        Raises:
            LossError: it does not, or has.
        """
        if self.size:  # what stands in for an empty batch need not reach the parameters
            self.loss.check_dependence()
        leaves = (*self.problem.params, *self.problem.batch)
        for i, (leaf, version) in enumerate(zip(leaves, self.versions, strict=True)):
            if leaf._version != version:
                raise LossError(
                    f"The loss changes {self.loss.names()[i]} in place, so it is not a pure function: make a new "
                    "tensor (a = a * b in place of a.mul_(b); an activation with inplace=False)"
                )

    def losses(self, parts: Sequence[Values]) -> Tensor:
        """Join the chunks' losses: `(B,)`, 0 for padding."""
        return self.rows([values.losses for values in parts])

    def aux(self, parts: Sequence[Values]) -> PyTree:
        """Join the chunks' aux into what the loss returned, each leaf `(B, ...)`, 0 for padding."""
        columns = zip(*(values.aux for values in parts), strict=True)
        return self.loss.unflatten_aux([self.rows(column) for column in columns])
