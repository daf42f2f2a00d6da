"""The stateless step of differentially private SGD: clip, add noise, update."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import random, trees
from pegrad._validate import check_scale, check_size
from pegrad.accounting.ledger import Entry, Ledger, recorded
from pegrad.adaptive import Adaptive, Bounds, centred_counts
from pegrad.clipping import Clipping, as_clipping
from pegrad.errors import ArgumentError
from pegrad.numerics import accumulator
from pegrad.optim.base import as_transformation
from pegrad.per_example import ClippedGrad, Loss
from pegrad.ranks import ALONE, Ranks
from pegrad.sampling import Sampler
from pegrad.strategies import Strategy, resolve
from pegrad.tracing.eager import outermost
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
    bounds: Bounds = ()
    """The clip norm of each group, where clipping is adaptive."""
    ledger: Ledger | None = None
    """What the steps have released; None: not known."""

    def __repr__(self) -> str:
        rest = ", ".join(f"{name}={getattr(self, name)}" for name in self._fields[1:])
        return f"State(key=key(…), {rest})"


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


class Release(NamedTuple):
    """What a step releases, before an optimizer makes an update of it."""

    grads: PyTree
    """Like the parameters, in at least float32: the clipped sum over the expected batch size, and noise."""
    state: State
    """The state after the step, but for the optimizer, whose state is as it was."""
    metrics: Metrics


torch.serialization.add_safe_globals([State, Metrics, Step, Release])  # for torch.load's default, weights_only=True


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
    _add_noise(random.each_normal(random.fold_in(key, step), grads), leaves, [std] * len(leaves))
    return trees.unflatten(spec, leaves)


def _std(noise_multiplier: float, sensitivity: Any) -> Any:
    """Return the standard deviation of the noise; a number where there is none, whatever the sensitivity is."""
    return noise_multiplier * sensitivity if noise_multiplier else 0.0


def _add_noise(noise: Iterator[Tensor], leaves: list[Tensor], stds: list[Any]) -> None:
    """Put noisy leaves into a list in place of the clean ones: two copies of one leaf at a time, never of all.

    A standard deviation is a number, or a float64 scalar.
    """
    noisy = [isinstance(std, Tensor) or bool(std) for std in stds]
    for index, (drawn, std) in enumerate(zip(noise, stds, strict=True) if any(noisy) else ()):
        if noisy[index]:
            leaves[index] = drawn.mul_(std).add_(leaves[index])


def dp_sgd(
    loss: Loss,
    optimizer: Any,
    *,
    clip_norm: float | Clipping | Adaptive,
    noise_multiplier: float,
    expected_batch_size: float,
    strategy: str | Strategy = "auto",
    microbatch_size: int | None = None,
    sampler: Sampler | None = None,
) -> "DPSGD":
    """Make the step of differentially private SGD.

    Args:
        loss: `loss(params, example) -> scalar` or `(scalar, aux)`, a pure function of one example.
        optimizer: a pair `(init, update)` in optax's sense: `init(params) -> state` and `update(grads, state, params)
            -> (updates, state)`, updates being added to the parameters. Those of `pegrad.optim`, TorchOpt's, or
            one's own, a plain tuple included.
        clip_norm: bound C on the norm of each example's gradient, > 0; a clipping of `pegrad.clipping`; or
            `pegrad.Adaptive`.
        noise_multiplier: standard deviation of the noise over the sensitivity, >= 0: of all that a step releases, the
            counts of adaptive clipping included.
        expected_batch_size: public constant that the sum of gradients is divided by, > 0; for Poisson sampling,
            sampling rate times number of examples.
        strategy: how gradients are computed; see `pegrad.per_example_grad`.
        microbatch_size: see `pegrad.clipped_grad`.
        sampler: how the batches are drawn, for the ledger; it is not called. None: the ledger says so, and no epsilon
            can be asked of it.

    Returns:
        A `DPSGD`: `init(params, key) -> State` and itself `(params, state, batch, mask=None) -> Step`; for a batch that
        arrives in micro-batches, `accumulate(params, state, microbatches) -> Step`.

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
    check_scale("expected_batch_size", expected_batch_size)
    check_size("microbatch_size", microbatch_size)
    adaptive = clip_norm if isinstance(clip_norm, Adaptive) else None
    gradient_noise = adaptive.gradient_noise_multiplier(noise_multiplier) if adaptive else noise_multiplier
    clipping = clip_norm.clipping if isinstance(clip_norm, Adaptive) else as_clipping(clip_norm)
    clipped = ClippedGrad(loss, clipping, resolve(strategy), microbatch_size, expected_batch_size)
    pair = as_transformation(optimizer)
    return DPSGD(clipped, pair.update, pair.init, noise_multiplier, gradient_noise, adaptive, sampler)


@dataclass(frozen=True)
class DPSGD:
    """A step of differentially private SGD. Made by `dp_sgd`.

    Guarantee: the new parameters are a function of the old ones, the state and a Gaussian mechanism: the clipped sum
    plus noise of standard deviation `gradient_noise_multiplier * sensitivity`, added once, whatever the micro-batches
    are. Bound to `test_step_adds_noise_of_the_stated_law` and `test_noise_is_added_once_whatever_the_micro_batches`.
    With adaptive clipping it is the sensitivity of the state's bounds, and the counts are released with it: see
    `pegrad.Adaptive`; bound to `test_noise_follows_the_current_bound` and
    `test_neighbours_move_sum_and_counts_within_the_joint_sensitivity`. What that amounts to over a run depends on how
    batches are drawn: see `pegrad.accounting`.

    It holds for one batch a state, and for whoever does not have the state. The noise is a function of the state's key
    and step alone, so one state used on two different batches adds the same noise to both, and the difference of what
    comes out is the difference of the clipped sums, without any noise. Never step twice from one state, except to
    repeat the very same step. Two runs on one data set need two keys.

    Random numbers that the loss draws from torch's generators, for dropout, come from the state's key and step and the
    micro-batch's number as well; the generators themselves are left as they were.

    Source: Abadi et al. 2016, Algorithm 1.
    """

    clipped_grad: ClippedGrad
    update: Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]
    init_optimizer: Callable[[PyTree], Any]
    noise_multiplier: float
    """σ of all that a step releases."""
    gradient_noise_multiplier: float
    """σ of the gradients alone; more than `noise_multiplier` where adaptive clipping releases counts beside them."""
    adaptive: Adaptive | None = None
    sampler: Sampler | None = None

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
        bounds = self.adaptive.start(params) if self.adaptive else ()
        return State(key, 0, self.init_optimizer(params), bounds, Ledger())

    def clipped_at(self, state: State) -> ClippedGrad:
        """Return the clipped gradient that a step from this state takes; adaptive bounds are the state's.

        Raises:
            ArgumentError: clipping is adaptive, and the state is of a step where it is not.
        """
        if self.adaptive is None:
            return self.clipped_grad
        if not state.bounds:
            raise ArgumentError(
                "Expected state.bounds to hold the clip norms of adaptive clipping, got (): the state is of a step "
                "without. Start them with state._replace(bounds=step.adaptive.start(params))"
            )
        return replace(self.clipped_grad, clipping=self.adaptive.at(state.bounds))

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
            ArgumentError: the state is not of this kind of step.
            LeafError, LossError: as `pegrad.per_example_grad`.
        """
        return self.accumulate(params, state, [(batch, mask)])

    @outermost
    def accumulate(self, params: PyTree, state: State, microbatches: Iterable[tuple[PyTree, Tensor | None]]) -> Step:
        """Take one step on a batch that arrives micro-batch by micro-batch, at the memory of one.

        Args:
            params: pytree of floating-point tensors.
            state: what `init` or the step before returned; never for two different batches.
            microbatches: pairs `(batch, mask)` that together are one batch, taken once and one at a time; a mask may be
                None. They may differ in size; none at all is an empty batch.

        Returns:
            What a step on the whole batch returns, up to rounding. Metrics are kept for every example, so let the loss
            return little aux.

        Raises:
            ArgumentError: a micro-batch is no pair, or the state is not of this kind of step.
            LeafError, LossError: as `pegrad.per_example_grad`.
        """
        grads, after, metrics = self.release(params, state, microbatches)
        noisy = [grads]
        del grads
        return Step(*self.updated(params, noisy, after), metrics)

    def updated(self, params: PyTree, noisy: list[PyTree], state: State) -> tuple[PyTree, State]:
        """Let the optimizer make an update of what a step released.

        Args:
            params: what the step was taken from.
            noisy: the noisy gradients, in a list that they are taken out of, so that they can be let go.
            state: what `release` returned.

        Returns:
            New parameters, and the state with the optimizer's.
        """
        with torch.no_grad():
            params = trees.map(Tensor.detach, params)
            updates, optimizer = self.update(noisy.pop(), state.optimizer, params)
            params = trees.map(lambda p, u: p + u.to(p.dtype), params, updates)
        return params, state._replace(optimizer=optimizer)

    @outermost
    def release(self, params: PyTree, state: State, microbatches: Iterable[tuple[PyTree, Tensor | None]]) -> Release:
        """Take a step but for the update: the noisy gradients, for an optimizer that is no pair, as of `torch.optim`.

        Args:
            params: as for `accumulate`.
            state: as for `accumulate`.
            microbatches: as for `accumulate`; for a batch in one piece `[(batch, mask)]`.

        Returns:
            Noisy gradients, the new state, and metrics.

        Raises:
            ArgumentError, LeafError, LossError: as `accumulate`.
        """
        return self.release_among(ALONE, params, state, enumerate(microbatches))

    def release_among(
        self, ranks: Ranks, params: PyTree, state: State, microbatches: Iterable[tuple[int, Any]]
    ) -> Release:
        """Take a step but for the update together with other ranks, of which each has some of the micro-batches.

        Args:
            ranks: what the ranks do together; `pegrad.ranks.ALONE` is `release`.
            params: as for `accumulate`.
            state: as for `accumulate`; the same on every rank.
            microbatches: pairs of a number, which no other micro-batch of the batch has on any rank, and a micro-batch
                as for `accumulate`. The random numbers that the loss draws depend on the number.

        Returns:
            As `release`, with the metrics of this rank's examples.

        Raises:
            ArgumentError, LeafError, LossError: as for `release`.
        """
        key = random.fold_in(state.key, state.step)
        clipped = ranks.clipped(self.clipped_at(state))
        with torch.no_grad():
            params = trees.map(Tensor.detach, params)
            sums, seen = clipped.init(params), []
            for number, given in microbatches:
                batch, mask = _microbatch(number, given)
                with random.torch_generators(self.loss_key(state, number), (params, batch)):
                    sums, losses, norms, aux, non_finite = clipped.add(sums, params, batch, mask)
                mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask.to(losses.device)
                seen.append(Metrics(losses, norms, aux, non_finite, mask))
            metrics = _joined(seen, trees.leaves(params)[0])
            leaves, spec = trees.flatten(clipped.finish(sums))
            del sums  # lets each leaf go as its noisy one comes
            stds = [_std(self.gradient_noise_multiplier, clipped.sensitivity)] * len(leaves)
            if self.adaptive:  # the counts are one leaf more of the same release
                leaves.append(ranks.total(centred_counts(metrics.norms, state.bounds, metrics.mask)))
                stds.append(self.adaptive.count_noise_std(state.bounds))
            _add_noise(ranks.each_normal(key, leaves), leaves, stds)
            bounds = state.bounds
            if self.adaptive:
                bounds = self.adaptive.following(bounds, leaves.pop(), clipped.normalize_by)
            for index, param in enumerate(trees.leaves(params)):
                leaves[index] = leaves[index].to(accumulator(param.dtype))  # of a large batch it is a float64
        return Release(trees.unflatten(spec, leaves), self.after(state)._replace(bounds=bounds), metrics)

    def after(self, state: State) -> State:
        """Return the state after a step, but for the optimizer's and adaptive bounds."""
        return state._replace(step=state.step + 1, ledger=recorded(state.ledger, self._entry()))

    @staticmethod
    def loss_key(state: State, microbatch: int) -> Tensor:
        """Return the key of the random numbers that the loss draws from torch's generators in a micro-batch."""
        return random.fold_in(random.fold_in(state.key, state.step), microbatch)

    def _entry(self) -> Entry:
        """Return what one step writes into the ledger."""
        count = self.adaptive.count_noise_multiplier if self.adaptive else None
        kind = type(self.adaptive or self.clipped_grad.clipping).__name__
        return Entry(self.sampler, float(self.gradient_noise_multiplier), count, kind, 1)


def _microbatch(number: int, given: Any) -> tuple[PyTree, Tensor | None]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise ArgumentError(
            f"Expected micro-batch {number} to be a pair (batch, mask), got {type(given).__name__}: mask may be None"
        )
    batch, mask = given
    return batch, mask


def _joined(seen: list[Metrics], param: Tensor) -> Metrics:
    """Join the metrics of micro-batches into those of the batch."""
    if len(seen) == 1:
        return seen[0]
    if not seen:
        none = param.new_empty(0, dtype=accumulator(param.dtype))
        return Metrics(none, none, None, none.new_zeros((), dtype=torch.int64), none.bool())
    losses, norms, aux, non_finite, masks = zip(*seen, strict=True)
    return Metrics(
        torch.cat(losses),
        torch.cat(norms, dim=-1),
        trees.map(lambda *parts: torch.cat(parts), *aux),
        torch.stack(non_finite).sum(),
        torch.cat(masks),
    )
