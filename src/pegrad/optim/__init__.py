"""Functional optimizers: pure `(init, update)` pairs in the sense of optax, composed of short ones.

An optimizer turns gradients into updates, and new parameters are `params + updates`. It is a pair:
`init(params)` returns a state, and `update(grads, state, params)` returns the updates and the next state.
Nothing is mutated. States are trees of tensors and plain Python integers.

Updates are differentiable functions of what they are given, so parameters that require gradients (a module's
own, say) want `detach()` first, or every step would keep the graph of all the steps before it.

Long optimizers are chains of short ones; `adamw`, for one, is

    chain(scale_by_adam(), add_decayed_weights(0.01), scale_by_learning_rate(1e-3))

A learning rate is a number or a schedule: any function from the step, counted from 0, to a number. `partition` gives
groups of parameters each an optimizer of its own, `masked` and `mask=` leave some out (biases do not decay),
`average_iterates` keeps a moving average of the parameters, and `clip_by_global_norm` bounds what a step has released.

>>> import torch
>>> optimizer = sgd(linear_warmup(0.1, steps=100), momentum=0.9)
>>> params = {"weight": torch.ones(2)}
>>> state = optimizer.init(params)
>>> grads = {"weight": torch.tensor([1.0, -1.0])}
>>> updates, state = optimizer.update(grads, state, params)
>>> params = apply_updates(params, updates)
"""

from pegrad.optim.averaging import AverageState, average_iterates
from pegrad.optim.base import GradientTransformation, State, apply_updates, chain
from pegrad.optim.partition import masked, partition
from pegrad.optim.schedules import (
    Schedule,
    constant,
    cosine_decay,
    exponential_decay,
    linear_decay,
    linear_warmup,
    piecewise_constant,
)
from pegrad.optim.transformations import (
    AdamState,
    adam,
    adamw,
    add_decayed_weights,
    clip_by_global_norm,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
)

__all__ = [
    "AdamState",
    "AverageState",
    "GradientTransformation",
    "Schedule",
    "State",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "average_iterates",
    "chain",
    "clip_by_global_norm",
    "constant",
    "cosine_decay",
    "exponential_decay",
    "linear_decay",
    "linear_warmup",
    "masked",
    "partition",
    "piecewise_constant",
    "scale_by_adam",
    "scale_by_learning_rate",
    "sgd",
    "trace",
]
