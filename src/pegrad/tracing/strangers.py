"""Tensors that a loss must not meet in a process that works with others: parts of tensors, parameters of its own."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from pegrad.errors import LossError
from pegrad.torch_internals import is_wrapped, without_overrides


def no_strangers(known: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Refuse, inside the block, what trains nothing without a word where a module is sharded.

    A module that FSDP wraps gathers its weights while it runs, and they are no parameters of the loss: their gradients
    would be none of those that are clipped. Only processes in a group of `torch.distributed` are watched; elsewhere a
    loss may well use weights that it does not train.

    Args:
        known: the parameters and the example, which may require a gradient.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return nullcontext()
    return _NoStrangers(known)


class _NoStrangers(TorchFunctionMode):
    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {id(tensor): tensor for tensor in known}

    def __enter__(self) -> Any:
        # Before FSDP's own hook, which must not be stopped half-way.
        self._hook = register_module_forward_pre_hook(_refuse_wrapped)
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch in place of `func`."""
        with without_overrides():
            for tensor in _tensors((args, kwargs or {})):
                self._look_at(tensor)
        result = func(*args, **(kwargs or {}))
        with without_overrides():
            for tensor in _tensors((result, args)):
                if _is_leaf(tensor):  # made in the loss, for a gradient of its own
                    self._known[id(tensor)] = tensor
        return result

    def _look_at(self, tensor: Tensor) -> None:
        tensors = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
        if tensors is not None and isinstance(tensor, tensors.DTensor):
            raise LossError(
                "The loss meets a DTensor, of which each process has a part: give the loss whole tensors. "
                "pegrad.distributed.data_parallel takes parameters that pegrad.distributed.shard has split"
            )
        if _is_leaf(tensor) and id(tensor) not in self._known and torch.is_grad_enabled():
            raise LossError(
                "The loss meets a tensor that requires a gradient and is no parameter: the weight of a module that it "
                "calls itself? Its gradient would be lost. Give it in params, by "
                "torch.func.functional_call(module, params, ...), or detach it"
            )


def _refuse_wrapped(module: nn.Module, _: Any) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has such a module has imported it
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        raise LossError(
            f"The loss calls {type(module).__name__}, which FSDP has wrapped: its weights, gathered while it runs, "
            "would get no gradient. Wrap no module; pegrad.distributed.shard splits parameters for data_parallel"
        )


def _is_leaf(tensor: Tensor) -> bool:
    return not is_wrapped(tensor) and tensor.requires_grad and tensor.is_leaf


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
