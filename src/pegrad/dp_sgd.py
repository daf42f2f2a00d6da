"""The stateless step of differentially private SGD: clip, add noise, update."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import random, trees
from pegrad._validate import check_positive
from pegrad.clipping import Clipping
from pegrad.errors import ArgumentError
from pegrad.numerics import accumulator
from pegrad.per_example import ClippedGrad, Loss, clipped_grad
from pegrad.strategies import Strategy
from pegrad.tracing.eager import eager
from pegrad.trees import PyTree


class State(NamedTuple):
    """What a training run is, beside its parameters: tensors and numbers.

    It holds the run's key, so it must stay secret: whoever has it can make the noise of every step again and subtract
    it. Publish the parameters, never the state. `torch.load` takes a saved state under its default settings, once
    `pegrad` is imported; an optimizer that is not of `pegrad.optim` may need `torch.serialization.add_safe_globals`.
    """

    key: Tensor
    """The run's key; every step folds its counter in, so the key itself never changes."""
    step: int
    """Steps taken."""
    optimizer: Any
    """The optimizer's own state."""

    def __repr__(self) -> str:
        return f"State(key=key(…), step={self.step}, optimizer={self.optimizer})"


class Metrics(NamedTuple):
    """What a step saw of single examples: for the experimenter's eyes, not covered by any privacy guarantee."""

    losses: Tensor
    """`(B,)`; 0 for padding."""
    norms: Tensor
    """`(B,)`, before clipping; 0 for padding. With clipping groups `(G, B)`, in the order of `ClippedGrad.groups`."""
    aux: PyTree
    """What the loss returned beside the scalar, each leaf with a leading axis `B`; 0 for padding."""
    non_finite: Tensor
    """Examples whose gradient was not finite, int64 scalar; see `Clipped.non_finite`."""
    mask: Tensor
    """`(B,)`, boolean: False for padding."""

    @property
    def mean_loss(self) -> Tensor:
        """The mean loss of the examples, padding left out: a scalar, NaN where there is no example."""
        return self.losses.sum() / self.mask.sum()

    @property
    def whole_norms(self) -> Tensor:
        """`(B,)`: the norms over all leaves together, whatever the clipping groups are."""
        return self.norms if self.norms.dim() == 1 else torch.linalg.vector_norm(self.norms, dim=0)


class Step(NamedTuple):
    """What a step returns."""

    params: PyTree
    state: State
    metrics: Metrics


torch.serialization.add_safe_globals([State, Metrics, Step])  # for torch.load's default, weights_only=True


def add_noise(key: Tensor, grads: PyTree, std: float, *, step: int) -> PyTree:
    """Add independent normal noise to every number of a pytree.

    The noise is a function of the key and the step: one key serves a whole loop, as long as every step has a number of
    its own. The same key and step for two different `grads` give both the same noise, and their difference none.

    Args:
        key: a key that is used for nothing else, kept secret; see `pegrad.random`.
        grads: pytree of floating-point tensors.
        std: standard deviation, >= 0: noise multiplier times sensitivity.
        step: the number of the step, at least 0; never the same twice under one key.

    Returns:
        A pytree like `grads`; its very leaves for `std` 0.

    Raises:
        ArgumentError: `std` is negative or not finite, `key` is not a key, or `step` is negative or not an integer.
        LeafError: a leaf of `grads` is not a floating-point tensor.

    Guarantee: no two numbers of the pytree, no two steps and no two keys share a value of the keystream. Bound to
    `test_noise_follows_the_stated_law` and `test_no_value_is_shared_by_leaves_steps_or_keys`.

    Source: Abadi et al. 2016, Algorithm 1 (add noise).
    """
    if not 0 <= std < float("inf"):
        raise ArgumentError(f"Expected std to be a finite number >= 0, got std={std}")
    leaves, spec = trees.flatten(grads)
    _add_noise(random.each_normal(random.fold_in(key, step), grads), leaves, std)
    return trees.unflatten(spec, leaves)


def _add_noise(noise: Iterator[Tensor], leaves: list[Tensor], std: float) -> None:
    """Put noisy leaves into a list in place of the clean ones: two copies of one leaf at a time, never of all."""
    for index, drawn in enumerate(noise if std else ()):
        leaves[index] = drawn.mul_(std).add_(leaves[index])


def dp_sgd(
    loss: Loss,
    optimizer: Any,
    *,
    clip_norm: float | Clipping,
    noise_multiplier: float,
    expected_batch_size: float,
    strategy: str | Strategy = "auto",
    microbatch_size: int | None = None,
) -> "DPSGD":
    """Make the step of differentially private SGD.

    Args:
        loss: `loss(params, example) -> scalar` or `(scalar, aux)`, a pure function of one example.
        optimizer: a pair `(init, update)` in optax's sense: `init(params) -> state` and `update(grads, state, params)
            -> (updates, state)`, updates being added to the parameters. Those of `pegrad.optim`, TorchOpt's, or
            one's own.
        clip_norm: bound C on the norm of each example's gradient, > 0; or a clipping of `pegrad.clipping`.
        noise_multiplier: standard deviation of the noise over the sensitivity, >= 0.
        expected_batch_size: public constant that the sum of gradients is divided by, > 0; for Poisson sampling,
            sampling rate times number of examples.
        strategy: how gradients are computed; see `pegrad.per_example_grad`.
        microbatch_size: see `pegrad.clipped_grad`.

    Returns:
        A `DPSGD`: `init(params, key) -> State` and itself `(params, state, batch, mask=None) -> Step`.

    Raises:
        ArgumentError: a number out of its bounds, an unknown strategy, or an optimizer without `init` and `update`.

    Guarantee: see `DPSGD`.

    >>> import torch, pegrad
    >>> def loss(params, example):
    ...     x, y = example
    ...     return (params["w"] @ x - y) ** 2
    >>> step = dp_sgd(loss, pegrad.optim.sgd(0.1), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=2)
    >>> params = {"w": torch.zeros(3)}
    >>> state = step.init(params, pegrad.random.key(0))
    >>> params, state, metrics = step(params, state, (torch.eye(3)[:2], torch.ones(2)))
    >>> state.step, metrics.norms
    (1, tensor([2., 2.]))
    """
    if not 0 <= noise_multiplier < float("inf"):
        raise ArgumentError(
            f"Expected noise_multiplier to be a finite number >= 0, got noise_multiplier={noise_multiplier}"
        )
    check_positive("expected_batch_size", expected_batch_size)
    clipped = clipped_grad(
        loss,
        clip_norm=clip_norm,
        strategy=strategy,
        microbatch_size=microbatch_size,
        normalize_by=expected_batch_size,
    )
    return DPSGD(clipped, _pure_update(optimizer), optimizer.init, noise_multiplier)


@dataclass(frozen=True)
class DPSGD:
    """A step of differentially private SGD. Made by `dp_sgd`.

    Guarantee: the new parameters are a function of the old ones, the state and a Gaussian mechanism: the clipped sum
    plus noise of standard deviation `noise_multiplier * sensitivity`, added once, whatever the micro-batches are. Bound
    to `test_step_adds_noise_of_the_stated_law`. What that amounts to over a run depends on how batches are drawn:
    see `pegrad.accounting`.

    It holds for one batch a state, and for whoever does not have the state. The noise is a function of the state's key
    and step alone, so one state used on two different batches adds the same noise to both, and the difference of what
    comes out is the difference of the clipped sums, without any noise. Never step twice from one state, except to
    repeat the very same step. Two runs on one data set need two keys.

    Random numbers that the loss draws from torch's generators, for dropout, come from the state's key and step as
    well; the generators themselves are left as they were.

    Source: Abadi et al. 2016, Algorithm 1.
    """

    clipped_grad: ClippedGrad
    update: Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]
    init_optimizer: Callable[[PyTree], Any]
    noise_multiplier: float

    def init(self, params: PyTree, key: Tensor) -> State:
        """Return the state before the first step.

        Args:
            params: pytree of floating-point tensors.
            key: the run's key, of `pegrad.random.key`, kept secret. Two runs on one data set need two keys.

        Raises:
            ArgumentError: `key` is no key.
            LeafError: a leaf of `params` is no floating-point tensor.
        """
        random.check_key(key)
        trees.flatten_params(params)
        return State(key, 0, self.init_optimizer(params))

    @eager
    def __call__(self, params: PyTree, state: State, batch: PyTree, mask: Tensor | None = None) -> Step:
        """Take one step: same arguments, same result, bit for bit; no argument is changed.

        Args:
            params: pytree of floating-point tensors.
            state: what `init` or the step before returned; never for two different batches.
            batch: pytree of tensors with one leading axis `B >= 0`.
            mask: `(B,)`, boolean; False marks padding. None: every row is an example.

        Returns:
            New parameters, new state, and metrics.

        Raises:
            LeafError, LossError: as `pegrad.per_example_grad`.
        """
        key = random.fold_in(state.key, state.step)
        with torch.no_grad():
            params = trees.map(Tensor.detach, params)
            with random.torch_generators(key, (params, batch)):
                grads, losses, norms, aux, non_finite = self.clipped_grad(params, batch, mask)
            mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask.to(losses.device)
            metrics = Metrics(losses, norms, aux, non_finite, mask)
            noise = random.each_normal(key, grads)
            leaves, spec = trees.flatten(grads)
            del grads  # lets each leaf go as its noisy one comes
            _add_noise(noise, leaves, self.noise_multiplier * self.clipped_grad.sensitivity)
            for index, param in enumerate(
                trees.leaves(params)
            ):  # the sum over a large batch is a float64: see numerics
                leaves[index] = leaves[index].to(accumulator(param.dtype))
            noisy = [trees.unflatten(spec, leaves)]
            del leaves
            updates, optimizer = self.update(noisy.pop(), state.optimizer, params)  # popped, so that it can be freed
            params = trees.map(lambda p, u: p + u.to(p.dtype), params, updates)
        return Step(params, State(state.key, state.step + 1, optimizer), metrics)


def _pure_update(optimizer: Any) -> Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]:
    """Call an optimizer's update so that it changes nothing in place, whatever it takes its parameters for."""
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise ArgumentError(
            f"Expected optimizer to have init and update, got {type(optimizer).__name__}: use pegrad.optim, TorchOpt's "
            "functional transformations or a pair of your own; a torch.optim.Optimizer changes parameters in place"
        )
    accepted = inspect.signature(optimizer.update).parameters
    if "inplace" in accepted:  # TorchOpt's default writes the updates over the gradients
        return lambda grads, state, params: optimizer.update(grads, state, params=params, inplace=False)
    return optimizer.update
