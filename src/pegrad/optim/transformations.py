"""The optimizers, and the transformations that they are chains of."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from pegrad import trees
from pegrad.numerics import squared_norms
from pegrad.optim.base import GradientTransformation, State, chain
from pegrad.optim.numbers import at
from pegrad.optim.partition import Labels, masked
from pegrad.optim.schedules import Schedule, checked_rate, constant, expect
from pegrad.trees import PyTree


class AdamState(NamedTuple):
    """What `scale_by_adam` remembers: the steps taken and the two running moments of the gradient."""

    steps: int
    mean: PyTree
    square: PyTree


torch.serialization.add_safe_globals([AdamState])  # for torch.load's default, weights_only=True


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | Schedule = 0.0,
    mask: Labels | None = None,
) -> GradientTransformation:
    """Stochastic gradient descent, equal to `torch.optim.SGD` up to rounding.

    Args:
        learning_rate: a number at least 0, or a schedule of the step.
        momentum: the factor that keeps past gradients, in [0, 1).
        nesterov: look one step ahead along the momentum, which must then be positive.
        weight_decay: the factor, at least 0, of the parameters that is added to the gradients.
        mask: which parameters decay, as for `masked`. None: all.

    Returns:
        The optimizer.

    Raises:
        ArgumentError: an argument is outside its bounds.
        LeafError: on a call, the mask does not fit the parameters.
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        trace(momentum, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


def adam(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.0,
    mask: Labels | None = None,
) -> GradientTransformation:
    """Adam, equal to `torch.optim.Adam` up to rounding.

    Args:
        learning_rate: a number at least 0, or a schedule of the step.
        b1: the decay of the first moment, in [0, 1).
        b2: the decay of the second moment, in [0, 1).
        eps: the positive number added to the root of the second moment.
        weight_decay: the factor, at least 0, of the parameters that is added to the gradients before their
            moments are taken (an L2 penalty).
        mask: which parameters decay, as for `masked`. None: all.

    Returns:
        The optimizer.

    Raises:
        ArgumentError: an argument is outside its bounds.
        LeafError: on a call, the mask does not fit the parameters.

    Source:
        Kingma and Ba 2015, Algorithm 1.
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_adam(b1=b1, b2=b2, eps=eps),
        scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.01,
    mask: Labels | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay, equal to `torch.optim.AdamW` up to rounding.

    Args:
        learning_rate: a number at least 0, or a schedule of the step.
        b1: the decay of the first moment, in [0, 1).
        b2: the decay of the second moment, in [0, 1).
        eps: the positive number added to the root of the second moment.
        weight_decay: the fraction of the parameters, at least 0, that a step at learning rate 1 would remove.
        mask: which parameters decay, as for `masked`; such as `lambda params: {name: p.dim() > 1 for name, p in
            params.items()}`, which leaves out biases and the gains of normalisations. None: all.

    Returns:
        The optimizer.

    Raises:
        ArgumentError: an argument is outside its bounds.
        LeafError: on a call, the mask does not fit the parameters.

    Source:
        Loshchilov and Hutter 2019, Algorithm 2.
    """
    return chain(
        scale_by_adam(b1=b1, b2=b2, eps=eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def add_decayed_weights(weight_decay: float | Schedule, mask: Labels | None = None) -> GradientTransformation:
    """Add `weight_decay * params` to the gradients.

    Args:
        weight_decay: a number at least 0, or a schedule of the step; 0 leaves the gradients exactly as they are.
        mask: which parameters decay, as for `masked`. None: all.

    Returns:
        A transformation without state for a number; for a schedule its state is the number of steps taken.

    Raises:
        ArgumentError: `weight_decay` is negative or not finite; a schedule's is checked at every step.
        LeafError: on a call, the mask does not fit the parameters.
    """
    if callable(weight_decay):
        decay = _by_step(
            lambda step, grads, params: _decayed(grads, params, at(step, lambda n: _checked_decay(weight_decay(n))))
        )
    elif _checked_decay(weight_decay) == 0:
        return chain()
    else:
        decay = GradientTransformation(
            lambda params: (), lambda grads, state, params: (_decayed(grads, params, weight_decay), state)
        )
    return decay if mask is None else masked(decay, mask)


def _decayed(grads: PyTree, params: PyTree, weight_decay: float) -> PyTree:
    return trees.map(lambda grad, param: grad + weight_decay * param, grads, params)


def _checked_decay(weight_decay: float) -> float:
    expect(0 <= weight_decay < math.inf, "weight_decay", weight_decay, "a finite number at least 0")
    return weight_decay


def clip_by_global_norm(max_norm: float | Schedule) -> GradientTransformation:
    """Scale gradients down to a norm over all leaves together, where theirs is larger.

    It is applied to what a step has released, noise and all, and so costs no privacy; nor does it bound any one
    example's gradient: that is `pegrad.clipped_grad`'s.

    Args:
        max_norm: a number above 0, or a schedule of the step.

    Returns:
        A transformation whose state is the number of steps taken.

    Raises:
        ArgumentError: `max_norm` is not a finite number above 0; a schedule's is checked at every step.

    Source:
        Pascanu et al. 2013, Algorithm 1; `clip_by_global_norm` of optax.
    """

    def checked(norm: float) -> float:
        expect(0 < norm < math.inf, "max_norm", norm, "a finite number above 0")
        return norm

    if not callable(max_norm):
        checked(max_norm)

    def clip(step: int, grads: PyTree, params: PyTree) -> PyTree:
        bound = at(step, lambda n: checked(max_norm(n))) if callable(max_norm) else max_norm
        norm = torch.stack([squared_norms(leaf[None]).squeeze(0) for leaf in trees.leaves(grads)]).sum().sqrt()
        factor = bound / norm.clamp(min=bound)  # exactly 1 for what is not clipped
        return trees.map(lambda grad: grad * factor.to(grad.dtype), grads)

    return _by_step(clip)


def trace(momentum: float, *, nesterov: bool = False) -> GradientTransformation:
    """Replace gradients by their running sum, in which a gradient fades by `momentum` at every step.

    Args:
        momentum: a number in [0, 1); 0 leaves the gradients as they are and keeps no state.
        nesterov: return what the sum would be one step ahead, should the gradient stay as it is; wants a
            momentum above 0.

    Returns:
        A transformation whose state is the sum, a pytree like the parameters.

    Raises:
        ArgumentError: `momentum` is outside its bounds.

    Source:
        Sutskever et al. 2013, Section 2, in the form of `torch.optim.SGD` (learning rate outside of the sum).
    """
    expect(0 <= momentum < 1, "momentum", momentum, "a number in [0, 1)")
    expect(momentum > 0 or not nesterov, "momentum", momentum, "above 0 when nesterov=True")
    if momentum == 0:
        return chain()

    def update(grads: PyTree, state: State, params: PyTree) -> tuple[PyTree, State]:
        state = trees.map(lambda grad, past: grad + momentum * past, grads, state)
        if nesterov:
            grads = trees.map(lambda grad, total: grad + momentum * total, grads, state)
            return grads, state
        return state, state

    return GradientTransformation(_zeros_like, update)


def scale_by_adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """Divide the running mean of the gradients by the root of their running mean square.

    Args:
        b1: the decay of the mean, in [0, 1).
        b2: the decay of the mean square, in [0, 1).
        eps: the positive number added to the root.

    Returns:
        A transformation whose state is an `AdamState`.

    Raises:
        ArgumentError: an argument is outside its bounds.

    Source:
        Kingma and Ba 2015, Algorithm 1, with its correction of the bias towards 0.
    """
    expect(0 <= b1 < 1, "b1", b1, "a number in [0, 1)")
    expect(0 <= b2 < 1, "b2", b2, "a number in [0, 1)")
    expect(0 < eps < math.inf, "eps", eps, "a finite number above 0")

    def init(params: PyTree) -> AdamState:
        return AdamState(0, _zeros_like(params), _zeros_like(params))

    def update(grads: PyTree, state: AdamState, params: PyTree) -> tuple[PyTree, AdamState]:
        steps = state.steps + 1
        mean = trees.map(lambda grad, past: (b1 * past).add_(grad, alpha=1 - b1), grads, state.mean)
        square = trees.map(lambda grad, past: (b2 * past).addcmul_(grad, grad, value=1 - b2), grads, state.square)
        mean_weight = at(steps, lambda n: 1 - b1**n)
        root_weight = at(steps, lambda n: math.sqrt(1 - b2**n))

        def scale(mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
            return (mean / mean_weight).div_((square.sqrt() / root_weight).add_(eps))

        return trees.map(scale, mean, square), AdamState(steps, mean, square)

    return GradientTransformation(init, update)


def scale_by_learning_rate(learning_rate: float | Schedule) -> GradientTransformation:
    """Multiply gradients by `-learning_rate`: the last link of a chain, which makes a descent of it.

    Args:
        learning_rate: a number at least 0, or a schedule of the step.

    Returns:
        A transformation whose state is the number of steps taken, a Python integer.

    Raises:
        ArgumentError: the learning rate is negative or not finite; a schedule's is checked at every step.
    """
    schedule = learning_rate if callable(learning_rate) else constant(learning_rate)

    def scale(step: int, grads: PyTree, params: PyTree) -> PyTree:
        rate = at(step, lambda n: checked_rate(schedule(n)))
        return trees.map(lambda grad: -rate * grad, grads)

    return _by_step(scale)


def _by_step(function: Callable[[int, PyTree, PyTree], PyTree]) -> GradientTransformation:
    """Make a transformation of `(step, grads, params) -> updates`, whose state is the step: a Python integer."""
    return GradientTransformation(
        lambda params: 0, lambda grads, step, params: (function(step, grads, params), step + 1)
    )


def _zeros_like(params: PyTree) -> PyTree:
    return trees.map(torch.zeros_like, params)
