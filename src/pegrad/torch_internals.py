"""What pegrad takes from PyTorch that PyTorch does not promise: all of it is here, and nowhere else.

From one version to the next PyTorch may rename or change any of it. A name that pegrad cannot do without, and that is
gone, ends the import with a sentence that says so; `tests/test_torch_internals.py` pins what each name does, so that a
version that does otherwise fails there, by name. What a loss calls for every operation is PyTorch's own function, bound
once. Nothing here brings the compiler along: what needs it is imported by those who do, inside a function.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import CDLL
from functools import partial, reduce
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VERSIONS = "2.11 to 2.14"
"""The versions of PyTorch that pegrad's tests have passed under."""


def _needed(path: str) -> Any:
    """Find a name of PyTorch's by its path below `torch`.

    Raises:
        ImportError: this version has none.
    """
    try:
        return reduce(getattr, path.split("."), torch)
    except AttributeError:
        raise ImportError(
            f"torch {torch.__version__} has no torch.{path}, which pegrad needs: install torch {VERSIONS}, or a "
            "pegrad that knows this one"
        ) from None


# Transforms of torch.func, which has no public way to ask which run and what they have wrapped; its own code asks so.

is_batched: Callable[[Tensor], bool] = _needed("_C._functorch.is_batchedtensor")
"""Tell whether a tensor has, under the `vmap` that is running, an axis that the loss does not see."""

is_tracked: Callable[[Tensor], bool] = _needed("_C._functorch.is_gradtrackingtensor")
"""Tell whether a tensor is one of `torch.func.grad`'s or its like, running or over."""

is_wrapped: Callable[[Tensor], bool] = _needed("_C._functorch.is_functorch_wrapped_tensor")
"""Tell whether a tensor is one of any transform's, running or over."""

unwrapped: Callable[[Tensor], Tensor] = _needed("_C._functorch.get_unwrapped")
"""Return the tensor below the innermost transform that wraps a tensor."""

hidden_axis: Callable[[Tensor], int] = _needed("_C._functorch.maybe_get_bdim")
"""Return the axis, of the tensor below, that the innermost transform of a tensor hides; -1: it is no `vmap`."""

level_of: Callable[[Tensor], int] = _needed("_C._functorch.maybe_get_level")
"""Return the level of the innermost transform that wraps a tensor; -1: none does, -2: it is over."""

wrapped: Callable[[Tensor, int, int], Tensor] = _needed("_C._functorch._add_batch_dim")
"""Hide an axis of a tensor, as the `vmap` of a level does: `wrapped(tensor, axis, level)`."""

level: Callable[[], int | None] = _needed("_C._functorch.maybe_current_level")
"""Return how deep in transforms of torch.func this runs; None outside of all."""

_innermost: Callable[[], Any] = _needed("_C._functorch.peek_interpreter_stack")
_running: Callable[[], list[Any] | None] = _needed("_C._functorch.get_interpreter_stack")
_as_vmap: Callable[[Any], Any] = _needed("_C._functorch.CVmapInterpreterPtr")
_GRAD: Any = _needed("_C._functorch.TransformType.Grad")
_VMAP: Any = _needed("_C._functorch.TransformType.Vmap")
_pop: Callable[[], Any] = _needed("_C._functorch.pop_dynamic_layer_stack")
_push: Callable[[Any], Any] = _needed("_C._functorch.push_dynamic_layer_stack")
_enter_vmap: Callable[[int, str], int] = _needed("_C._functorch._vmap_increment_nesting")
_leave_vmap: Callable[[], int] = _needed("_C._functorch._vmap_decrement_nesting")
_may_require_grad: Callable[[], bool] = _needed("_C._functorch.get_inplace_requires_grad_allowed")
_let_require_grad: Callable[[bool], None] = _needed("_C._functorch.set_inplace_requires_grad_allowed")


def transformed() -> bool:
    """Tell whether a transform of torch.func is running."""
    return _innermost() is not None


def differentiated() -> bool:
    """Tell whether a transform of torch.func other than `vmap` is running."""
    return any(interpreter.key() != _VMAP for interpreter in _running() or ())


def vmaps() -> list[tuple[int, str]]:
    """Return the batch size of each `vmap` that is running, and what it says of randomness, the outermost first."""
    maps = [_as_vmap(interpreter) for interpreter in _running() or () if interpreter.key() == _VMAP]
    return [(mapped.batchSize(), mapped.randomness().name.lower()) for mapped in maps]


def innermost_vmap() -> tuple[int, int]:
    """Return the level and the batch size of the innermost transform, which must be a `vmap`."""
    interpreter = _innermost()
    return interpreter.level(), _as_vmap(interpreter).batchSize()


def innermost_grad() -> int | None:
    """Return the level of the innermost transform, if it is `torch.func.grad` or its like, else None."""
    interpreter = _innermost()
    return interpreter.level() if interpreter is not None and interpreter.key() == _GRAD else None


@contextmanager
def lowered(to: int | None) -> Iterator[None]:
    """Inside the block, the transforms of torch.func above a level do not run; None: none runs."""
    popped = []
    try:
        while level() != to:
            popped.append(_pop())
        yield
    finally:
        while popped:
            _push(popped.pop())


@contextmanager
def entered(batch: int, randomness: str) -> Iterator[None]:
    """Inside the block, one more `vmap` runs: tensors that escaped from another of its level and batch are alive."""
    _enter_vmap(batch, randomness)
    try:
        yield
    finally:
        _leave_vmap()


@contextmanager
def changing_requires_grad() -> Iterator[None]:
    """Inside the block, a tensor may be made to require a gradient of the innermost `torch.func.grad`."""
    before = _may_require_grad()
    _let_require_grad(True)
    try:
        yield
    finally:
        _let_require_grad(before)


# Modes and hooks that are in force.

without_subclasses: Callable[[], AbstractContextManager[None]] = _needed("_C.DisableTorchFunctionSubclass")
"""Inside the block, functions of tensors are PyTorch's own for subclasses of tensors too; modes see them."""

without_overrides: Callable[[], AbstractContextManager[None]] = _needed("_C.DisableTorchFunction")
"""Inside the block, functions of tensors are PyTorch's: no mode and no subclass of tensors takes their place."""

function_modes: Callable[[], list[TorchFunctionMode]] = _needed("overrides._get_current_function_mode_stack")
"""Return the modes that see calls of PyTorch's functions, the outermost first."""

saved_tensors_hooks: Callable[[], tuple[Callable[..., Any], Callable[..., Any]] | None] = partial(
    _needed("_C._autograd._top_saved_tensors_default_hooks"),
    True,  # while something is traced too
)
"""Return the innermost pair of hooks on what autograd saves, `torch.autograd.graph.saved_tensors_hooks`'s."""

SAVES_INPUTS = "_NoopSaveInputs"
"""The function by which `torch.utils.checkpoint` keeps its arguments in PyTorch 2.11, and which no transform knows."""


# A tensor, its memory, its graph.

is_view: Callable[[Tensor], bool] = _needed("Tensor._is_view")
"""Tell whether autograd takes a tensor for a view of another."""

unsafe_view: Any = _needed("ops.aten._unsafe_view")
"""Give a tensor, that nobody else will use, another shape: a reshape that autograd takes for no view."""

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def shares_memory(tensor: Tensor) -> bool:
    """Tell whether others lie in a tensor's memory, be they no views to autograd: by `detach()`, or numpy's.

    True as well where PyTorch does not count them.
    """
    # Two are the tensor, and the storage as asked here.
    return _use_count is None or _use_count(tensor.untyped_storage()._cdata) > 2


def backward_node(function: type[torch.autograd.Function]) -> type:
    """Return the type of the nodes that a function of one's own leaves in autograd's graph."""
    return function._backward_cls


# Functions and modules without a public name, for tables of what to call instead, and to be recognised.

PACK: Callable[..., Any] | None = getattr(torch, "_pack_padded_sequence", None)
"""What `torch.nn.utils.rnn.pack_padded_sequence` calls."""

PAD: Callable[..., Any] | None = getattr(torch, "_pad_packed_sequence", None)
"""What `torch.nn.utils.rnn.pad_packed_sequence` calls."""

ALIGNED: Callable[..., Any] | None = getattr(torch, "_nested_tensor_from_mask_left_aligned", None)
"""What `nn.TransformerEncoder` asks in evaluation: whether all padding lies at the end, as in nested tensors."""

BatchNorm = torch.nn.modules.batchnorm._BatchNorm
"""The class of every batch normalisation of `torch.nn`."""

InstanceNorm = torch.nn.modules.instancenorm._InstanceNorm
"""The class of every instance normalisation of `torch.nn`."""


# The compiler, which takes a second to import: named, and not imported.

DYNAMO = "torch._dynamo"
"""The module that is imported, and in `sys.modules`, once anybody has compiled something."""


def import_compiler() -> None:
    """Import `DYNAMO`."""
    import_module(DYNAMO)


def compiler(backend: str) -> Callable[..., Any]:
    """Return a backend of `torch.compile`'s, from a graph and example tensors to a function of such tensors.

    Raises:
        Exception: there is none of that name.
    """
    from torch._dynamo import lookup_backend

    return lookup_backend(backend)


def inductor_settings(settings: dict[str, Any]) -> AbstractContextManager[None]:
    """Inside the block, Inductor has some settings.

    `fallback_random` makes its random numbers those of eager PyTorch; `pattern_matcher` rewrites what looks like
    attention.
    """
    from torch._inductor import config

    return config.patch(settings)


def cpp_library(source: str) -> CDLL:
    """Compile C++ as Inductor does its kernels, for this processor, and load it; what was compiled before is kept.

    Raises:
        Exception: there is no compiler, or it refuses.
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source, "cpu")


# Operations as a mode sees them, below autograd and all transforms.

TorchDispatchMode: Any = _needed("utils._python_dispatch.TorchDispatchMode")
"""A mode that sees them."""

Operation: Any = _needed("_ops.OpOverload")
"""The class of an operation."""


def written(operation: Any) -> list[tuple[int, str]]:
    """Return the arguments that an operation writes to, each by place and name."""
    arguments = enumerate(operation._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def returns_view(operation: Any) -> bool:
    """Tell whether what an operation returns lies in the memory of an argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)


def in_place(operation: Any) -> Any:
    """Return the operation that writes what this one returns over its first argument; None: PyTorch has none."""
    packet = getattr(torch.ops.aten, f"{operation._opname}_", None) if operation.namespace == "aten" else None
    return getattr(packet, operation._overloadname, None)
