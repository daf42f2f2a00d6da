"""A user's loss, made into a function of plain lists of tensors that checks what it returns."""

from collections.abc import Callable
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad import trees
from pegrad.errors import LeafError, LossError, PegradError
from pegrad.torch_internals import ALIGNED, changing_requires_grad, transformed
from pegrad.tracing.batched import is_constant
from pegrad.tracing.explanations import explanation
from pegrad.tracing.interception import Interception, on
from pegrad.tracing.lineage import reaches
from pegrad.tracing.strangers import no_strangers
from pegrad.tracing.strided import STRIDED


class FlatLoss:
    """`(parameter leaves, example leaves) -> (scalar loss, aux leaves)` from `loss(params, example)`.

    `torch.func` does not know optree's nodes, so only lists of tensors pass through it. What the aux looks like is
    known once the loss has run.

    Args:
        loss: `loss(params, example) -> scalar` or `(scalar, aux)`.
        params: the structure of the parameters.
        batch: the structure of an example.
        check: raises an error unless the value is one that is expected. None: a real scalar.

    Attributes:
        function: the loss, as the user wrote it.
    """

    def __init__(
        self,
        loss: Any,
        params: optree.PyTreeSpec,
        batch: optree.PyTreeSpec,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self.function = loss
        self._check = check or _check_scalar
        self._params = params
        self._batch = batch
        self._aux: optree.PyTreeSpec | None = None
        self._ran = self._depends = False

    def __call__(self, params: list[Tensor], example: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the loss on one example.

        Raises:
            LossError: the loss returned anything but a real scalar, or coupled examples by batch normalisation.
            LeafError: a leaf of aux is neither a tensor nor a number.
        """
        interception = Interception(_REPLACEMENTS)
        try:
            with no_strangers((*params, *example)), on(interception):
                result = self.function(trees.unflatten(self._params, params), trees.unflatten(self._batch, example))
        except TypeError as failure:  # of ours, which are TypeErrors, an operator makes "unsupported operand type(s)"
            raise next((e for e in interception.raised if isinstance(e, PegradError)), failure)  # noqa: B904
        for error in interception.raised:
            if isinstance(error, PegradError) or explanation(error):
                raise error  # the loss caught what the plain loop would not have raised, and took another path
        value, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        self._check(value)
        self._ran, self._depends = True, self._depends or _depends(value, params)
        leaves, structure = trees.flatten(aux)
        if self._aux is not None and structure != self._aux:
            raise LossError(
                "The loss returns aux of one structure for some examples and of another for others: return the same "
                "names and numbers of tensors on every path"
            )
        self._aux = structure
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor | bool | int | float):
                raise LeafError(
                    f"aux{trees.path(aux, i)} is of type {type(leaf).__name__}: expected a tensor or a number for each "
                    "example"
                )
        return value, [torch.as_tensor(leaf, device=value.device) for leaf in leaves]

    def names(self) -> list[str]:
        """Return the path of each parameter leaf, then of each leaf of the batch."""
        return [
            accessor.codify(root)
            for root, spec in (("params", self._params), ("batch", self._batch))
            for accessor in spec.accessors()
        ]

    def check_dependence(self) -> None:
        """Raise `LossError` if the loss has run, and never depended on its parameters."""
        if self._ran and not self._depends:
            raise independent()

    def unflatten_aux(self, leaves: list[Tensor]) -> trees.PyTree:
        """Put the leaves of aux back into the structure that the loss returned last."""
        assert self._aux is not None, "the loss has not run"
        return trees.unflatten(self._aux, leaves)


class IndependentError(LossError):
    """The loss depends on no parameter."""


def independent() -> IndependentError:
    """Make the error of a loss that depends on no parameter: its gradient is zero, and a step would be noise alone."""
    return IndependentError(
        "The loss does not depend on any leaf of params, so every gradient is zero. Does it call a module itself, "
        "whose weights are its own, in place of torch.func.functional_call(module, params, ...)? Or does it cut the "
        "graph (detach, no_grad, .item(), .data)?"
    )


def _depends(value: Tensor, params: list[Tensor]) -> bool:
    """Tell whether a value depends on parameters; under `vmap` alone nobody knows, and the trace asks itself."""
    return not is_constant(value) if transformed() else reaches(value, params)


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


def _whole_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """Run `F.linear_cross_entropy` in one piece: in chunks it works out gradients in a way that no transform sees."""
    return F.linear_cross_entropy(*args, **kwargs)


def _not_aligned(*args: Any) -> bool:
    """Keep `nn.TransformerEncoder` in evaluation from nested tensors, as it does itself where a gradient is wanted."""
    return False


def _require_grad(input: Tensor, requires_grad: bool = True) -> Tensor:
    """Run `Tensor.requires_grad_`, which transforms refuse even where there is nothing to change."""
    if requires_grad and input.requires_grad:
        return input
    with changing_requires_grad():
        return input.requires_grad_(requires_grad)


_REPLACEMENTS: dict[Any, Any] = {
    F.batch_norm: _refuse_batch_norm,
    Tensor.requires_grad_: _require_grad,
    **STRIDED,
}
if ALIGNED is not None:
    _REPLACEMENTS[ALIGNED] = _not_aligned
if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    _REPLACEMENTS[F.linear_cross_entropy] = _whole_cross_entropy
