"""A training run in pure pieces: settings make a plan, a plan makes steps, and any step can be evaluated.

>>> from pegrad import random

>>> from pegrad.papers import data
>>> digits = data.load_digits()
>>> privacy = Privacy(delta=1e-4, noise_multiplier=1.0)
>>> plan = make_plan(Settings(batch_size=64, epochs=0.1, lr=1e-3), privacy, digits)
>>> *_, last = steps(plan, digits, random.key(0))
>>> evaluation = evaluate(plan, digits, last)
>>> evaluation.step, round(evaluation.epsilon, 1)
(3, 0.8)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad import accounting, optim, random, trees
from pegrad.adaptive import Adaptive
from pegrad.clipping import Automatic, Clipping, PerLayer
from pegrad.dp_sgd import DPSGD, Metrics, State, Step, dp_sgd
from pegrad.errors import ArgumentError
from pegrad.papers import models
from pegrad.papers.data import Dataset
from pegrad.papers.models import Model
from pegrad.per_example import Loss
from pegrad.sampling import Draw, PoissonSampler, ShuffledSampler
from pegrad.trees import PyTree

_ROWS_AT_A_TIME = 100  # of the test set: intermediate values that stay in the cache


@dataclass(frozen=True)
class Settings:
    """How to train, with privacy or without.

    Args:
        batch_size: mean number of examples in a batch, from 1 to the number of training examples.
        epochs: passes over the training set, > 0; parts of one are allowed.
        lr: Adam's learning rate.
    """

    batch_size: int
    epochs: float
    lr: float


@dataclass(frozen=True)
class Privacy:
    """What makes training private. Exactly one of `noise_multiplier` and `epsilon` is given.

    Args:
        delta: δ in (0, 1).
        noise_multiplier: σ >= 0, the noise's standard deviation over the sensitivity.
        epsilon: ε > 0, the budget that the whole run spends; the noise follows from it.
        clip_norm: see `pegrad.dp_sgd`. With clipping groups, norms are shown over all leaves together.
        strategy: see `pegrad.per_example_grad`.
        microbatch_size: see `pegrad.clipped_grad`.

    Raises:
        ArgumentError: both or none of `noise_multiplier` and `epsilon` are given.
    """

    delta: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    clip_norm: float | Clipping | Adaptive = 1.0
    strategy: str = "auto"
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ArgumentError(
                f"Expected one of noise_multiplier and epsilon, got noise_multiplier={self.noise_multiplier} and "
                f"epsilon={self.epsilon}"
            )


# Chosen on held-out parts of the training set, never on the test set. MNIST's are those of Rochette et al. 2019.
PRESETS: dict[str, tuple[Settings, Privacy]] = {
    "digits": (Settings(batch_size=256, epochs=70, lr=5e-3), Privacy(delta=1e-4, epsilon=8.0)),
    "mnist": (Settings(batch_size=64, epochs=1, lr=1e-3), Privacy(delta=1e-5, noise_multiplier=1.1)),
}


# By name: from a clip norm and the expected batch size. The counts' noise is the choice of Andrew et al. 2021.
CLIPPINGS: dict[str, Callable[[float, float], float | Clipping | Adaptive]] = {
    "flat": lambda clip_norm, _: clip_norm,
    "per_layer": lambda clip_norm, _: PerLayer(clip_norm),
    "automatic": lambda clip_norm, _: Automatic(clip_norm),
    "adaptive": lambda clip_norm, batch_size: Adaptive(clip_norm, count_noise_multiplier=batch_size / 10),
}


@dataclass(frozen=True)
class PlainSGD:
    """A step without privacy, called like `pegrad.DPSGD`: the gradient of the batch's mean loss, and an update."""

    loss: Loss
    optimizer: optim.GradientTransformation

    def init(self, params: PyTree, key: Tensor) -> State:
        """Return the state before the first step."""
        return State(key, 0, self.optimizer.init(params))

    def __call__(self, params: PyTree, state: State, batch: PyTree) -> Step:
        """Take one step; its metrics have `(0,)` norms, since the mean gradient tells none."""
        with random.torch_generators(random.fold_in(state.key, state.step), (params, batch)):
            grads, losses = mean_grad(self.loss)(params, batch)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, params)
        mask = torch.ones_like(losses, dtype=torch.bool)
        metrics = Metrics(losses, losses.new_empty(0), None, torch.zeros((), dtype=torch.int64), mask)
        return Step(optim.apply_updates(params, updates), State(state.key, state.step + 1, optimizer), metrics)


@dataclass(frozen=True)
class Plan:
    """What a training run is to do. Made by `make_plan`.

    Raises:
        ArgumentError: a private step was told of another sampler than the one that draws its batches.
    """

    model: Model
    step: DPSGD | PlainSGD
    sampler: PoissonSampler | ShuffledSampler
    steps: int
    delta: float | None

    def __post_init__(self) -> None:
        if isinstance(self.step, DPSGD) and self.step.sampler != self.sampler:
            raise ArgumentError(
                "Expected the step's sampler, which its ledger charges for, to be the plan's, which draws the batches, "
                f"{self.sampler}, got {self.step.sampler}"
            )

    @property
    def noise_multiplier(self) -> float | None:
        """σ; None without privacy."""
        return self.step.noise_multiplier if isinstance(self.step, DPSGD) else None

    def epsilon(self, state: State) -> float | None:
        """Compute what the steps up to a state have spent, by the state's ledger and PLD; None without privacy."""
        return None if self.delta is None else accounting.epsilon(state.ledger, self.delta)

    def clip_norm(self, state: State) -> float | None:
        """Return the bound on a clipped gradient in the step that follows a state; None without privacy."""
        return self.step.clipped_at(state).clipping.sensitivity if isinstance(self.step, DPSGD) else None

    def taken(self, dataset: Dataset, params: PyTree, state: State, draw: Draw) -> Step:
        """Take a step on the examples that were drawn.

        Padding is left out: no shape is compiled for here, and it takes time.
        """
        rows = draw.indices[draw.mask]
        return self.step(params, state, (dataset.train_images[rows], dataset.train_labels[rows]))


class Progress(NamedTuple):
    """Where a run stands: what the rest of it follows from, beside its plan and its data.

    It holds the run's keys, so it must stay secret. `torch.load` takes a saved one under its default settings.
    """

    params: PyTree
    state: State
    sampler_key: Tensor
    """The key that the batches are drawn by."""


class Evaluation(NamedTuple):
    """What can be said after a step."""

    step: int
    """Steps taken."""
    epsilon: float | None
    """Privacy spent so far, at the plan's δ; None without privacy."""
    test_accuracy: float
    """Share of the test set that is classified right."""
    clip_norm: float | None
    """The bound on a clipped gradient from here on; it moves where clipping is adaptive. None without privacy."""


torch.serialization.add_safe_globals([Progress, Evaluation])  # for torch.load's default, weights_only=True


def make_plan(settings: Settings, privacy: Privacy | None, dataset: Dataset) -> Plan:
    """Plan the training of the MNIST network of Rochette et al. by Adam.

    Args:
        settings: how to train.
        privacy: by DP-SGD on Poisson batches; None: by the mean gradient of shuffled batches.
        dataset: what to train on; square images.

    Returns:
        A plan, with the noise multiplier that meets the budget where `privacy` states one.

    Raises:
        ArgumentError: a number out of its bounds.
        MissingExtraError: `privacy` is given and dp-accounting is not installed.
    """
    size = len(dataset.train_labels)
    if not 1 <= settings.batch_size <= size:
        raise ArgumentError(
            f"Expected batch_size from 1 to the {size} training examples, got batch_size={settings.batch_size}"
        )
    if not 0 < settings.epochs < math.inf:
        raise ArgumentError(f"Expected epochs to be a finite number > 0, got epochs={settings.epochs}")
    model = models.mnist_cnn(image_size=dataset.train_images.shape[-1], num_classes=dataset.num_classes)
    loss, optimizer = cross_entropy(model), optim.adam(settings.lr)
    count = math.ceil(settings.epochs * size / settings.batch_size)
    if privacy is None:
        shuffled = ShuffledSampler(size, settings.batch_size)
        return Plan(model, PlainSGD(loss, optimizer), shuffled, count, None)
    poisson = PoissonSampler(size, settings.batch_size / size)
    step = dp_sgd(
        loss,
        optimizer,
        clip_norm=privacy.clip_norm,
        noise_multiplier=_noise_multiplier(privacy, poisson, count),
        expected_batch_size=poisson.expected_batch_size,
        strategy=privacy.strategy,
        microbatch_size=privacy.microbatch_size,
        sampler=poisson,
    )
    return Plan(model, step, poisson, count, privacy.delta)


def steps(plan: Plan, dataset: Dataset, key: Tensor) -> Iterator[Step]:
    """Train, from fresh parameters.

    Args:
        plan: what to do.
        dataset: what the plan was made for; training runs on its device.
        key: the run's key, of `pegrad.random.key`: same key, same run. It must stay secret, and with it all that is
            drawn from it: the state of every step, and which examples were in its batch.

    Yields:
        What each of the plan's steps returned. Only the parameters are private as the plan states; the metrics
        tell of single examples, and the state holds a key.
    """
    yield from remaining(plan, dataset, begin(plan, dataset, key))


def begin(plan: Plan, dataset: Dataset, key: Tensor) -> Progress:
    """Return where a run stands before its first step: see `steps`."""
    init_key, sampler_key, state_key = random.split(key, 3)
    device = dataset.train_images.device
    params = trees.map(lambda leaf: leaf.to(device), plan.model.init(init_key))
    return Progress(params, plan.step.init(params, state_key), sampler_key)


def remaining(plan: Plan, dataset: Dataset, progress: Progress) -> Iterator[Step]:
    """Take the steps that are left of a run, and none of those before.

    Args:
        plan: the run's plan.
        dataset: what the plan was made for; training runs on its device.
        progress: of `begin`; or after a step of the run, by what it returned and the same sampler's key.

    Yields:
        As `steps`.

    Guarantee: these are the steps of the run that was never cut off, bit for bit: the same batches under the same
    noise, so that a step which is taken once more releases nothing new. Bound to
    `test_the_rest_of_a_run_is_that_of_the_whole`.
    """
    params, state, sampler_key = progress
    for index in range(state.step, plan.steps):
        taken = plan.taken(dataset, params, state, plan.sampler(sampler_key, index))
        params, state, _ = taken
        yield taken


def evaluate(plan: Plan, dataset: Dataset, taken: Step) -> Evaluation:
    """Evaluate the parameters that a step returned.

    Args:
        plan: the run's plan.
        dataset: whose test set to use.
        taken: what `steps` yielded.

    Returns:
        An `Evaluation`.
    """
    hits = accuracy(plan.model, taken.params, dataset.test_images, dataset.test_labels)
    state = taken.state
    return Evaluation(state.step, plan.epsilon(state), hits, plan.clip_norm(state))


def accuracy(model: Model, params: PyTree, images: Tensor, labels: Tensor) -> float:
    """Return the share of `(N, C, H, W)` images whose largest logit is that of their label `(N,)`."""
    logits = torch.func.vmap(model.apply, (None, 0))
    parts = zip(images.split(_ROWS_AT_A_TIME), labels.split(_ROWS_AT_A_TIME), strict=True)
    hits = sum((logits(params, part).argmax(1) == classes).sum().item() for part, classes in parts)
    return hits / len(labels)


def cross_entropy(model: Model) -> Loss:
    """Make the loss of one example, a pair of image and class, from a classifier."""

    def loss(params: PyTree, example: tuple[Tensor, Tensor]) -> Tensor:
        image, label = example
        return F.cross_entropy(model.apply(params, image), label)

    return loss


def mean_grad(loss: Loss) -> Callable[[PyTree, PyTree], tuple[PyTree, Tensor]]:
    """Make the function that training without privacy needs: the gradient of a batch's mean loss.

    Args:
        loss: `loss(params, example) -> scalar`, a pure function of one example.

    Returns:
        `(params, batch) -> (grads, losses)`, `losses` being `(B,)`; for pytrees that torch knows as such.

    >>> grads, losses = mean_grad(lambda w, x: w * x)(torch.tensor(3.0), torch.tensor([1.0, 2.0]))
    >>> grads, losses
    (tensor(1.5000), tensor([3., 6.]))
    """
    losses_of = torch.func.vmap(loss, (None, 0), randomness="different")

    def mean(params: PyTree, batch: PyTree) -> tuple[Tensor, Tensor]:
        losses = losses_of(params, batch)
        return losses.mean(), losses

    return torch.func.grad(mean, has_aux=True)


def _noise_multiplier(privacy: Privacy, sampler: PoissonSampler, steps: int) -> float:
    if privacy.epsilon is not None:
        return accounting.noise_multiplier_for(privacy.epsilon, privacy.delta, sampler, steps)
    assert privacy.noise_multiplier is not None, "Privacy has one of the two"
    return privacy.noise_multiplier
