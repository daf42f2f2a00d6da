"""JAX-Privacy, and the non-private gradient by JAX beside it: what the one adds is told apart from what JAX takes.

Both differentiate one translation of the task's network, compiled before anything is timed.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import native
from pegrad.trees import PyTree
from workloads import Task

Apply = Callable[[list[Any], Any], Any]


def jax_privacy(task: Task, clip_norm: float, microbatch_size: int | None = None) -> Callable[[], PyTree]:
    """`jax_privacy.clipped_grad`; `microbatch_size` is its own option of that name."""
    import jax_privacy

    def make(loss: Apply) -> Apply:
        return jax_privacy.clipped_grad(loss, l2_clip_norm=clip_norm, microbatch_size=microbatch_size)

    return _compiled(task, make)


def jax_gradient(task: Task, clip_norm: float) -> Callable[[], PyTree]:
    """The gradient of the summed loss: no clipping, no privacy."""
    import jax

    return _compiled(task, jax.grad)


def _compiled(task: Task, make: Callable[[Apply], Apply]) -> Callable[[], PyTree]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some of a GPU's memory too
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", task.batch[0].dtype == torch.float64)
    apply = _translated(task.module())

    def loss(params: list[Any], batch: tuple[Any, Any]) -> Any:
        images, labels = batch
        logits = jax.nn.log_softmax(apply(params, images))
        return -jnp.take_along_axis(logits, labels[:, None], 1).sum()

    params = [_to_jax(leaf) for leaf in native.declared(task.params)]
    batch = _to_jax(task.batch[0]), _to_jax(task.batch[1].int())
    function = jax.jit(make(loss)).lower(params, batch).compile()

    def call() -> PyTree:
        grads = jax.block_until_ready(function(params, batch))
        return native.restored(task.params, map(torch.from_dlpack, grads))

    return call


def _to_jax(tensor: Tensor) -> Any:
    import jax

    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def _translated(module: nn.Module) -> Apply:
    """A chain of layers as a function of its parameters, in the order of their declaration, and of a batch."""

    def apply(params: list[Any], x: Any) -> Any:
        remaining = iter(params)
        for layer in module:
            x = _LAYERS[type(layer)](layer, remaining, x)
        return x

    unknown = {type(layer).__name__ for layer in module if type(layer) not in _LAYERS}
    if unknown:
        raise NotImplementedError(f"not translated to JAX: {', '.join(sorted(unknown))}")
    return apply


def _conv(layer: nn.Conv2d, params: Iterator[Any], x: Any) -> Any:
    import jax

    padding = [(p, p) for p in layer.padding]
    y = jax.lax.conv_general_dilated(x, next(params), layer.stride, padding, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return y + next(params)[:, None, None]


def _linear(layer: nn.Linear, params: Iterator[Any], x: Any) -> Any:
    return x @ next(params).T + next(params)


def _max_pool(layer: nn.MaxPool2d, params: Iterator[Any], x: Any) -> Any:
    import jax

    window, stride = (1, 1, layer.kernel_size, layer.kernel_size), (1, 1, layer.stride, layer.stride)
    return jax.lax.reduce_window(x, -float("inf"), jax.lax.max, window, stride, "VALID")


def _adaptive_mean_pool(layer: nn.AdaptiveAvgPool2d, params: Iterator[Any], x: Any) -> Any:
    if x.shape[2:] != (layer.output_size, layer.output_size):
        raise NotImplementedError("not translated to JAX: adaptive pooling that changes the size")
    return x


def _relu(layer: nn.ReLU, params: Iterator[Any], x: Any) -> Any:
    import jax

    return jax.nn.relu(x)


def _tanh(layer: nn.Tanh, params: Iterator[Any], x: Any) -> Any:
    import jax

    return jax.numpy.tanh(x)


def _flatten(layer: nn.Flatten, params: Iterator[Any], x: Any) -> Any:
    return x.reshape(x.shape[0], -1)


_LAYERS: dict[type[nn.Module], Callable[[Any, Iterator[Any], Any], Any]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: _adaptive_mean_pool,
    nn.ReLU: _relu,
    nn.Tanh: _tanh,
    nn.Flatten: _flatten,
}
