"""Layer, group, instance, RMS and frozen batch normalisation: their scale and shift."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.rules.bias import Bias, Reduction, over_images, over_leading
from pegrad.rules.costs import Work
from pegrad.rules.site import Kernel, Recorder, Rule, Shape, Site, Tap


@dataclass(frozen=True, eq=False)
class Scale(Site):
    """The scale of a normalisation: its gradient is the sum over positions of `g` times the normalised input.

    Args:
        source: see `Site`.
        operation: see `Site`.
        normalise: the normalisation without scale and shift.
        reduce: sums over positions, `(B, ...)` to `(B, *source.shape)`.
    """

    normalise: Callable[[Tensor], Tensor]
    reduce: Reduction

    def stacking(self, x: Shape, g: Shape) -> dict[str, Kernel]:
        """See `Site.stacking`."""
        work = Work(0, moved=5 * prod(g))
        return {"sum": Kernel("reduce", work, lambda x, g: self.reduce(self.normalise(x).mul_(g)))}


def _affine(
    trace: Recorder,
    name: str,
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reduce: Reduction,
) -> Any:
    """Record `function(x, weight, bias)`; each of the two may be a parameter, a constant or absent."""
    if not trace.is_batched(input) or any(t is not None and trace.is_batched(t) for t in (weight, bias)):
        return NotImplemented

    def run(x: Tensor, tap: Tap) -> Tensor:
        sites: list[Site] = []
        if weight is not None and trace.is_parameter(weight):
            sites.append(Scale(weight, f"{name} scale", lambda x: function(x, None, None), reduce))
        if bias is not None and trace.is_parameter(bias):
            sites.append(Bias(bias, f"{name} shift", reduce))
        return tap(function(x, *(None if t is None else t.detach() for t in (weight, bias))), x, sites)

    return trace.record(run, input)


def layer_norm(
    trace: Recorder,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Rule of `F.layer_norm`."""

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    return _affine(trace, "layer norm", function, input, weight, bias, over_leading(len(normalized_shape)))


def rms_norm(
    trace: Recorder,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Rule of `F.rms_norm`."""

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, normalized_shape, weight, eps)

    return _affine(trace, "rms norm", function, input, weight, None, over_leading(len(normalized_shape)))


def group_norm(
    trace: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Rule of `F.group_norm`."""

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        images = x.flatten(0, 1)
        return F.group_norm(images, num_groups, weight, bias, eps).reshape(x.shape)

    witness = next((t for t in (weight, bias) if t is not None and trace.is_batched(t)), None)
    if witness is not None and trace.is_parameter(input):  # copies share their memory; the kernel wants them laid out
        images = trace.expand(input, witness, "group norm").clone(memory_format=torch.contiguous_format)
        weight, bias = (
            trace.expand(t, witness, "group norm") if t is not None and trace.is_parameter(t) else t
            for t in (weight, bias)
        )
        return F.group_norm(images, num_groups, weight, bias, eps)
    return _affine(trace, "group norm", function, input, weight, bias, _over_images(input.shape[0]))


def instance_norm(
    trace: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Rule of `F.instance_norm`, where each image is normalised by its own statistics."""
    if not use_input_stats or running_mean is not None:
        return NotImplemented

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        images = x.flatten(0, 1)
        return F.instance_norm(images, None, None, weight, bias, True, momentum, eps).reshape(x.shape)

    return _affine(trace, "instance norm", function, input, weight, bias, _over_images(input.shape[0]))


def batch_norm(
    trace: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Rule of `F.batch_norm` with statistics that are frozen, and constants."""
    if training or running_mean is None or running_var is None or not input.numel():
        return NotImplemented
    statistics = running_mean, running_var
    if any(trace.is_parameter(t) or trace.is_batched(t) for t in statistics):
        return NotImplemented

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = (t.to(x.dtype) if x.dtype.itemsize > t.dtype.itemsize else t for t in statistics)
        return F.batch_norm(x.flatten(0, 1), mean, var, weight, bias, False, momentum, eps).reshape(x.shape)

    return _affine(trace, "batch norm", function, input, weight, bias, _over_images(input.shape[0]))


def _over_images(images: int) -> Reduction:
    reduce = over_images(images)
    return lambda t: reduce(t.flatten(0, 1))


RULES: dict[Any, Rule] = {
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
}
