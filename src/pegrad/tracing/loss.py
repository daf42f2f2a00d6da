"""A user's loss, made into a function of plain lists of tensors that checks what it returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad import trees
from pegrad.errors import LeafError, LossError
from pegrad.tracing.interception import Interception
from pegrad.tracing.strided import STRIDED


class FlatLoss:
    """`(parameter leaves, example leaves) -> (scalar loss, aux leaves)` from `loss(params, example)`.

    `torch.func` does not know optree's nodes, so only lists of tensors pass through it. What the aux looks like is
    known once the loss has run.

    Args:
        loss: `loss(params, example) -> scalar` or `(scalar, aux)`.
        params: the structure of the parameters.
        batch: the structure of an example.
    """

    def __init__(self, loss: Any, params: optree.PyTreeSpec, batch: optree.PyTreeSpec) -> None:
        self._loss = loss
        self._params = params
        self._batch = batch
        self._aux: optree.PyTreeSpec | None = None

    def __call__(self, params: list[Tensor], example: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the loss on one example.

        Raises:
            LossError: the loss returned anything but a real scalar, or coupled examples by batch normalisation.
            LeafError: a leaf of aux is neither a tensor nor a number.
        """
        with Interception(_REPLACEMENTS), _explain_captured_writes():
            result = self._loss(trees.unflatten(self._params, params), trees.unflatten(self._batch, example))
        value, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        _check_scalar(value)
        leaves, self._aux = trees.flatten(aux)
        for path, leaf in zip(trees.paths(aux), leaves, strict=True):
            if not isinstance(leaf, Tensor | bool | int | float):
                raise LeafError(
                    f"aux{path} is of type {type(leaf).__name__}: expected a tensor or a number for each example"
                )
        return value, [torch.as_tensor(leaf, device=value.device) for leaf in leaves]

    def unflatten_aux(self, leaves: list[Tensor]) -> trees.PyTree:
        """Put the leaves of aux back into the structure that the loss returned last."""
        assert self._aux is not None, "the loss has not run"
        return trees.unflatten(self._aux, leaves)


def _check_scalar(value: Any) -> None:
    expected = "expected a real floating-point scalar, or a tuple (scalar, aux)"
    if not isinstance(value, Tensor):
        raise LossError(f"The loss returned a value of type {type(value).__name__}: {expected}")
    if value.dim() != 0:
        raise LossError(
            f"The loss returned a tensor of shape {tuple(value.shape)}: {expected}. "
            "It sees one example without a batch axis: reduce over all axes (.sum() or .mean())"
        )
    if not value.is_floating_point():
        raise LossError(f"The loss returned a tensor of dtype {value.dtype}: {expected}")


@contextmanager
def _explain_captured_writes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "mutate a captured Tensor" not in str(error):
            raise
        raise LossError(
            "The loss writes in place to a tensor that it neither made nor was given, so it is not a pure function. "
            "If that is a batch normalisation in training mode counting its batches: use group or layer "
            "normalisation, or freeze the statistics (module.eval())"
        ) from error


def _refuse_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        raise LossError(
            "The loss calls batch normalisation in training mode, which makes every example's output depend on the "
            "others: a per-example gradient is not defined. Use group or layer normalisation, or freeze the "
            "statistics (module.eval())"
        )
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_REPLACEMENTS: dict[Any, Any] = {F.batch_norm: _refuse_batch_norm, **STRIDED}
