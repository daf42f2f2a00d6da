"""MNIST with privacy: the run of Rochette et al. 2019, and the best accuracy that we reach at three budgets.

    python benchmarks/mnist.py [--scale smoke|cpu|full] [--data DIR]

The paper's network is trained for an epoch with privacy and without, step by step in turns. The best accuracy is that
of a linear classifier of scattering features (`scattering.py`), trained by `pegrad.dp_sgd` on large Poisson batches.
Its batch, epochs and learning rate are chosen for each budget on the last 10,000 training images, after training on
the others; the choices' own cost in privacy is not accounted for, as in the works it is compared with. The test set
is looked at once for each seed, after the choice. At scale `smoke`, scikit-learn's digits stand in.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pegrad
import plotting
import report
import runner
from pegrad import accounting, optim, random, trees
from pegrad.papers import data, training
from pegrad.papers.comparison import timed
from pegrad.papers.data import Dataset
from pegrad.papers.models.layers import linear
from pegrad.sampling import PoissonSampler
from runner import Effort, Point, Results, spread
from scattering import scattering

EFFORTS = {"smoke": Effort(rounds=1), "cpu": Effort(rounds=3), "full": Effort(rounds=5)}
DELTA = 1e-5
EPSILONS = 1.16, 2.93, 6.86
CLIP_NORM, MOMENTUM, AVERAGING = 0.1, 0.9, 0.9
PUBLISHED = {
    "Opacus's example": [(1.16, 0.9463), (2.91, 0.9678), (6.86, 0.9709)],
    "Papernot et al. 2021, tanh CNN": [(2.93, 0.981)],
    "Tramèr & Boneh 2021, scattering": [(2.93, 0.987)],
}


class Recipe(NamedTuple):
    """What is chosen on held-out training images."""

    batch_size: int
    epochs: int
    learning_rate: float


class Split(NamedTuple):
    """Features `(N, D)` and labels `(N,)` to train on, and others to test on."""

    features: Tensor
    labels: Tensor
    test_features: Tensor
    test_labels: Tensor


RECIPES = {
    "smoke": [Recipe(256, 2, 4.0)],
    "cpu": [Recipe(*recipe) for recipe in product((4096,), (30, 60), (2.0, 4.0))],
    "full": [Recipe(*recipe) for recipe in product((2048, 4096, 8192), (30, 60), (2.0, 4.0, 8.0))],
}
HELD_OUT = {"smoke": 360, "cpu": 10_000, "full": 10_000}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("MNIST with privacy: the paper's run, and the best accuracy.", EFFORTS)
    folder = Path(os.environ["PEGRAD_DATA"], "mnist") if "PEGRAD_DATA" in os.environ else None
    parser.add_argument("--data", type=Path, default=folder, help="folder of MNIST's four files ($PEGRAD_DATA/mnist)")
    options = runner.parse(parser, argv)
    if options.scale != "smoke" and options.data is None:
        parser.error("say where MNIST is: --data DIR, or PEGRAD_DATA")
    recipes, rounds = RECIPES[options.scale], options.effort.rounds

    @cache
    def dataset() -> Dataset:
        loaded = data.load_digits() if options.scale == "smoke" else data.load_mnist(options.data)
        tensors = {name: t.to(options.device) for name, t in loaded._asdict().items() if isinstance(t, Tensor)}
        return loaded._replace(**tensors)

    @cache
    def features() -> Split:
        return scattered(dataset())

    def choose(recipe: Recipe, epsilon: float) -> Point:
        return fit(held_out(features(), HELD_OUT[options.scale]), recipe, epsilon, seed=0)

    def best(epsilon: float, seed: int) -> Point:
        recipe = max(recipes, key=lambda recipe: results[_choice(epsilon, recipe)]["accuracy"])
        return fit(features(), recipe, epsilon, seed)

    stem = options.out / f"mnist_{options.scale}_{options.device}"
    settings = {"delta": DELTA, "clip_norm": CLIP_NORM, "momentum": MOMENTUM, "averaging": AVERAGING, "seeds": rounds}
    results = Results(stem.with_suffix(".json"), settings, options.device, fresh=options.fresh)
    points = {"paper": lambda: papers_run(dataset(), options.device)}
    points |= {_choice(e, recipe): partial(choose, recipe, e) for e in EPSILONS for recipe in recipes}
    points |= {f"best/{e}/{seed}": partial(best, e, seed) for e in EPSILONS for seed in range(rounds)}
    runner.run(points, results)
    ours = {e: [results[f"best/{e}/{seed}"] for seed in range(rounds)] for e in EPSILONS}
    _show(results["paper"], ours)
    lines = {"pegrad, scattering": [(e, mean(run["accuracy"] for run in ours[e])) for e in EPSILONS], **PUBLISHED}
    note = f"δ = {DELTA:g}; ours: means of {rounds} seeds, {results.where()}"
    plotting.accuracy_by_budget(lines, f"{dataset().name}: test accuracy", note).savefig(stem.with_suffix(".png"))
    print(f"{stem}.json, {stem}.png")


def papers_run(dataset: Dataset, device: str) -> Point:
    """Train the paper's network by the paper's settings with privacy and without, step by step in turns.

    Returns:
        `private` and `non-private`, test accuracies; `epsilon`; `ratio`, the spread of the steps' times over one
        another; `seconds` of all steps, private and not.
    """
    settings, privacy = training.PRESETS["mnist"]
    plans = [training.make_plan(settings, how, dataset) for how in (privacy, None)]
    runs = [training.steps(plan, dataset, random.key(0)) for plan in plans]
    times: list[tuple[float, ...]] = []
    for _ in range(plans[0].steps):
        last, seconds = zip(*(timed(partial(next, run), device) for run in runs), strict=True)
        times.append(seconds)
    private, plain = (training.evaluate(plan, dataset, step) for plan, step in zip(plans, last, strict=True))
    return {
        "private": private.test_accuracy,
        "non-private": plain.test_accuracy,
        "epsilon": private.epsilon,
        "ratio": spread(with_privacy / without for with_privacy, without in times),
        "seconds": [sum(own) for own in zip(*times, strict=True)],
    }


def scattered(dataset: Dataset) -> Split:
    """Compute scattering features, normalised in groups of channels of one image: no statistic of the data is used."""

    def features(images: Tensor) -> Tensor:
        channels = torch.cat([scattering(part[:, 0]) for part in images.split(500)])
        return F.group_norm(channels, 27).flatten(1)

    return Split(
        features(dataset.train_images),
        dataset.train_labels,
        features(dataset.test_images),
        dataset.test_labels,
    )


def held_out(split: Split, count: int) -> Split:
    """Test on the last training examples; the test set is left out."""
    return Split(split.features[:-count], split.labels[:-count], split.features[-count:], split.labels[-count:])


def fit(split: Split, recipe: Recipe, epsilon: float, seed: int) -> Point:
    """Train a linear classifier within a budget.

    Returns:
        `accuracy` of an average of the iterates on the test examples; `recipe`, `noise_multiplier`, `steps`, `seconds`.
    """
    size, width = split.features.shape
    sampler = PoissonSampler(size, recipe.batch_size / size)
    steps = round(recipe.epochs * size / recipe.batch_size)
    noise_multiplier = accounting.noise_multiplier_for(epsilon, DELTA, sampler, steps)
    classifier = linear(width, 10)
    step = pegrad.dp_sgd(
        training.cross_entropy(classifier),
        optim.sgd(recipe.learning_rate, momentum=MOMENTUM),
        clip_norm=CLIP_NORM,
        noise_multiplier=noise_multiplier,
        expected_batch_size=sampler.expected_batch_size,
    )
    sampler_key, state_key = random.split(random.key(seed))
    params = {"weight": split.features.new_zeros(10, width), "bias": split.features.new_zeros(10)}
    state, average = step.init(params, state_key), params
    start = perf_counter()
    for index in range(steps):
        draw = sampler(sampler_key, index)
        rows = draw.indices[draw.mask].to(split.features.device)
        params, state, _ = step(params, state, (split.features[rows], split.labels[rows]))
        average = trees.map(lambda past, new: torch.lerp(new, past, AVERAGING), average, params)
    return {
        "accuracy": training.accuracy(classifier, average, split.test_features, split.test_labels),
        "recipe": recipe._asdict(),
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "seconds": perf_counter() - start,
    }


def _choice(epsilon: float, recipe: Recipe) -> str:
    return f"choice/{epsilon}/{'/'.join(map(str, recipe))}"


def _show(paper: Point, ours: Mapping[float, list[Point]]) -> None:
    console = Console(width=100)
    table = Table("an epoch of the paper's network", "accuracy", "× time")
    table.add_row("non-private", f"{paper['non-private']:.2%}", "1")
    shown = f"{paper['private']:.2%}", report.with_quartiles(paper["ratio"])
    table.add_row(f"private, ε = {paper['epsilon']:.2f}", *shown)
    console.print(table)
    table = Table("ε", "test accuracy by seed", "mean", "batch", "epochs", "rate", "seconds", title=f"δ = {DELTA:g}")
    for epsilon, runs in ours.items():
        accuracies = [run["accuracy"] for run in runs]
        shown = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies), f"{mean(accuracies):.2%}"
        recipe = map(str, runs[0]["recipe"].values())
        table.add_row(f"{epsilon}", *shown, *recipe, f"{mean(run['seconds'] for run in runs):.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
