"""Functional optimizers: pure `(init, update)` pairs in the sense of optax, composed of short ones.

An optimizer turns gradients into updates, and new parameters are `params + updates`. It is a pair:
`init(params)` returns a state, and `update(grads, state, params)` returns the updates and the next state.
Nothing is mutated. States are trees of tensors and plain Python integers.

Updates are differentiable functions of what they are given, so parameters that require gradients (a module's
own, say) want `detach()` first, or every step would keep the graph of all the steps before it.

Long optimizers are chains of short ones; `adamw`, for one, is

    chain(scale_by_adam(), add_decayed_weights(0.01), scale_by_learning_rate(1e-3))

A learning rate is a number or a schedule: any function from the step, counted from 0, to a number.

>>> import torch
>>> optimizer = sgd(linear_warmup(0.1, steps=100), momentum=0.9)
>>> params = {"weight": torch.ones(2)}
>>> state = optimizer.init(params)
>>> grads = {"weight": torch.tensor([1.0, -1.0])}
>>> updates, state = optimizer.update(grads, state, params)
>>> params = apply_updates(params, updates)
"""

from pegrad.optim.schedules import Schedule, constant, cosine_decay, linear_warmup
from pegrad.optim.transformations import (
    AdamState,
    GradientTransformation,
    State,
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
)

__all__ = [
    "AdamState",
    "GradientTransformation",
    "Schedule",
    "State",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "constant",
    "cosine_decay",
    "linear_warmup",
    "scale_by_adam",
    "scale_by_learning_rate",
    "sgd",
    "trace",
]
