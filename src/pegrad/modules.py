"""For people with a module: a pure function of one example and its parameters, and the way back.

A module holds its parameters and wants a batch. `from_module` splits it into `apply`, which runs it on one example by
`torch.func.functional_call`, and `params`, a dict of what is trained; `to_module` writes trained ones back.
`replace_batch_norm` takes out what makes an example's output depend on the others.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from pegrad import trees
from pegrad.errors import ArgumentError, LeafError, LossError
from pegrad.torch_internals import BatchNorm, InstanceNorm

_Module = TypeVar("_Module", bound=nn.Module)


class Functional(NamedTuple):
    """A module in two parts. Made by `from_module`."""

    apply: "Apply"
    """`apply(params, *args, **kwargs)` runs the module on one example."""
    params: dict[str, Tensor]
    """Copies of the parameters that require a gradient, by name; a tied one is there once."""


def from_module(module: nn.Module, *, batch_axis: int | None = 0) -> Functional:
    """Split a module into a pure function of one example and the parameters to be trained.

    What is trained is what requires a gradient. Frozen parameters and buffers stay with the module, as does its mode:
    `module.train()` and `module.eval()` hold from the next call on. In a loss under `pegrad.dp_sgd`, dropout draws
    from the step's key.

    Args:
        module: any module, such as `nn.Sequential`, a Hugging Face model, or one with LoRA adapters. It is not changed.
        batch_axis: the axis of its tensors along which it expects examples; None, if it takes one example as it is.

    Returns:
        `(apply, params)`: see `Apply`.

    Raises:
        ArgumentError: no parameter requires a gradient, one has no shape yet (lazy modules), or `batch_axis` is no
            axis.
        LossError: a batch or instance normalisation takes its statistics from the batch.

    Source: `torch.func.functional_call`.

    >>> import torch, pegrad
    >>> model = torch.nn.Linear(3, 2)
    >>> apply, params = from_module(model)
    >>> def loss(params, example):
    ...     x, label = example
    ...     return torch.nn.functional.cross_entropy(apply(params, x), label)
    >>> batch = torch.eye(3), torch.tensor([0, 1, 0])
    >>> out = pegrad.clipped_grad(loss, clip_norm=1.0)(params, batch)
    >>> {name: tuple(grad.shape) for name, grad in out.grads.items()}
    {'weight': (2, 3), 'bias': (2,)}
    >>> model = to_module(model, params)
    """
    if batch_axis is not None and (not isinstance(batch_axis, int) or batch_axis < 0):
        raise ArgumentError(f"Expected batch_axis to be None or a whole number >= 0, got batch_axis={batch_axis}")
    own = _trained(module)
    _refuse_coupling(module)
    like = {name: parameter.detach().to("meta") for name, parameter in own.items()}
    params = {name: parameter.detach().clone() for name, parameter in own.items()}
    return Functional(Apply(module, batch_axis, like), params)


@dataclass(frozen=True, eq=False)
class Apply:
    """Run a module on one example, as a pure function of the parameters. Made by `from_module`.

    Every tensor among the arguments, in dicts, tuples and the like as well, gets a batch axis of size 1, and every
    tensor of the output loses it; one whose axis there is of another size, or which has none, such as a mean loss, is
    returned as it is. All else is passed on unchanged.

    If `params` come in another dtype than the module's, frozen parameters and buffers of that dtype follow, so that
    `pegrad.check` can compare in float64.
    """

    module: nn.Module
    batch_axis: int | None
    like: Mapping[str, Tensor]
    """For each name in `params`, a tensor of the module's own shape and dtype, on the meta device."""

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the module.

        Args:
            params: like those of `from_module`.
            args: the module's arguments for one example, without a batch axis.
            kwargs: the same, by name.

        Returns:
            What the module returns, without the batch axis.

        Raises:
            LeafError: `params` has other names or shapes than the module's.
            LossError: the module changes its buffers, so that one example reaches the next.
        """
        _check_names(params, self.like)
        watched = _Watched(self.module)
        state = {**watched.buffers_now(), **{f"module.{name}": tensor for name, tensor in params.items()}}
        moved = {own.dtype: params[name].dtype for name, own in self.like.items() if params[name].dtype != own.dtype}
        if moved:
            given = {**dict(watched.named_parameters()), **state}
            cast = {id(tensor): tensor.to(moved.get(tensor.dtype, tensor.dtype)) for tensor in given.values()}
            state = {name: cast[id(tensor)] for name, tensor in given.items()}  # what was shared stays shared
        output = functional_call(watched, state, trees.map(self._with_axis, (args, kwargs)))
        return trees.map(self._without_axis, output)

    def _with_axis(self, value: Any) -> Any:
        if self.batch_axis is None or not isinstance(value, Tensor):
            return value
        if value.dim() < self.batch_axis:
            raise LeafError(
                f"An argument of shape {tuple(value.shape)} cannot get an axis at batch_axis={self.batch_axis}, "
                "which pegrad.from_module was given"
            )
        return value.unsqueeze(self.batch_axis)

    def _without_axis(self, value: Any) -> Any:
        if self.batch_axis is None or not isinstance(value, Tensor) or value.dim() <= self.batch_axis:
            return value
        return value.squeeze(self.batch_axis)


class _Watched(nn.Module):
    """Run a module, and refuse if that changes its buffers: the example would be seen in the next one's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._owners = [(f"{name}.", owner) for name, owner in self.named_modules() if owner is not self]

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = {name: (id(buffer), _version(buffer)) for name, buffer in self.buffers_now().items()}
        output = self.module(*args, **kwargs)
        after = {name: (id(buffer), _version(buffer)) for name, buffer in self.buffers_now().items()}
        for name in (*before, *after):
            if before.get(name) != after.get(name):
                raise LossError(
                    f"The module changes its buffer {name.removeprefix('module.')!r} as it runs, so it is not a pure "
                    "function of one example. If that is a normalisation: call module.eval(), or see "
                    "pegrad.modules.replace_batch_norm"
                )
        return output

    def buffers_now(self) -> dict[str, Tensor]:
        return {
            name + own: buffer
            for name, owner in self._owners
            for own, buffer in owner._buffers.items()
            if buffer is not None
        }


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def to_module(module: _Module, params: Mapping[str, Tensor], *, copy: bool = False) -> _Module:
    """Write parameters into a module, by name.

    Args:
        module: the module that `from_module` was given, or one with the same trained parameters.
        params: like those of `from_module`.
        copy: write into a copy, and leave the module as it is.

    Returns:
        The module, or its copy.

    Raises:
        LeafError: `params` has other names or shapes than the module's trained parameters.
        ArgumentError: no parameter of the module requires a gradient.
    """
    own = _trained(module)
    _check_names(params, own)
    if copy:
        module = deepcopy(module)
        own = _trained(module)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(params[name])
    return module


def replace_batch_norm(module: nn.Module, *, groups: int = 32) -> nn.Module:
    """Replace batch normalisation by group normalisation, on a copy of a module.

    Scale, shift and `eps` are kept; running statistics are not. Every `nn.BatchNorm1d`, `2d`, `3d` and
    `nn.SyncBatchNorm` gets as many groups of equal size as there can be, up to `groups`, each of at least two channels
    if there are two. An instance normalisation with running statistics gets one group a channel: what it computes in
    training mode.

    Args:
        module: any module; it is not changed.
        groups: the most groups of a normalisation, >= 1.

    Returns:
        The copy, for per-example gradients in training mode as well.

    Raises:
        ArgumentError: `groups` is below 1; or a normalisation is of a class that is not PyTorch's own, or lazy.

    Source: Wu & He 2018, Group Normalization.

    >>> import torch
    >>> model = replace_batch_norm(torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3), torch.nn.BatchNorm2d(48)))
    >>> type(model[1]).__name__, model[1].num_groups
    ('GroupNorm', 24)
    """
    if not isinstance(groups, int) or groups < 1:
        raise ArgumentError(f"Expected groups to be a whole number >= 1, got groups={groups}")
    _refuse_lazy(module)
    module = deepcopy(module)
    if isinstance(module, BatchNorm | InstanceNorm):
        return _as_group_norm("module", module, groups)
    replacements: dict[nn.Module, nn.Module] = {}  # a shared normalisation stays shared
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, BatchNorm | InstanceNorm):
            if child not in replacements:
                replacements[child] = _as_group_norm(name, child, groups)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, replacements[child])
    return module


def _as_group_norm(name: str, norm: BatchNorm | InstanceNorm, groups: int) -> nn.Module:
    if isinstance(norm, InstanceNorm) and not norm.track_running_stats:
        return norm
    if type(norm).__module__.partition(".")[0] != "torch":
        raise ArgumentError(
            f"{name} is a {type(norm).__name__}, which may have more to it than the normalisation: replace it by hand, "
            "by nn.GroupNorm"
        )
    channels = norm.num_features
    if isinstance(norm, InstanceNorm):
        groups = channels
    else:
        groups = max(
            (g for g in range(1, groups + 1) if channels % g == 0 and channels // g >= min(2, channels)), default=1
        )
    new = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    return new.train(norm.training)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that require a gradient, by name."""
    _refuse_lazy(module)
    own = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not own:
        raise ArgumentError(
            f"No parameter of this {type(module).__name__} requires a gradient, so there is nothing to train: call "
            "requires_grad_() on those to be trained"
        )
    return own


def _refuse_lazy(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ArgumentError(f"The module's {name} has no shape yet: run the lazy module on a batch first")


def _check_names(params: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check that `params` has the names and shapes of the module's trained parameters.

    Raises:
        LeafError: it does not.
    """
    if not isinstance(params, Mapping):
        raise LeafError(f"params is of type {type(params).__name__}: expected a dict like that of pegrad.from_module")
    for wrong, what in ((like.keys() - params.keys(), "lacks"), (params.keys() - like.keys(), "has")):
        if wrong:
            shown = ", ".join(repr(name) for name in sorted(wrong, key=str)[:3])
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise LeafError(
                f"params {what} {shown}{more}, unlike the module's trained parameters: pass a dict with the names that "
                "pegrad.from_module returned"
            )
    for name, own in like.items():
        given = params[name]
        if not isinstance(given, Tensor) or given.shape != own.shape:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise LeafError(f"params[{name!r}] is {got}, but the module's parameter is {tuple(own.shape)}")


def _refuse_coupling(module: nn.Module) -> None:
    """Refuse normalisations that take statistics from the batch, or keep them."""
    for name, child in module.named_modules():
        batch = isinstance(child, BatchNorm) and (child.training or child.running_mean is None)
        instance = isinstance(child, InstanceNorm) and child.training and child.track_running_stats
        if batch or instance:
            raise LossError(
                f"The module{name and '.'}{name} is a {type(child).__name__} that takes its statistics from the batch, "
                "so every example's output depends on the others: replace it (pegrad.modules.replace_batch_norm), or "
                "freeze the statistics (module.eval())"
            )
