"""Which clipping learns most at one ε: flat, per layer, automatic, adaptive, with augmentation multiplicity.

    python benchmarks/accuracy.py [--scale smoke|cpu|full] [--data DIR]

The MNIST network of Rochette et al. 2019 is trained by DP-SGD on scikit-learn's digits, and on MNIST where `--data`
says where it is. K copies of an image are one example (De et al. 2022, "Unlocking high-accuracy differentially private
image classification through scale"): its loss is the mean over them, so its gradient is clipped once, and K costs time
and no privacy. One copy is the image itself, the others are shifted; K = 1 is training without augmentation.

All is the same for every clipping but the learning rate, which comes from a small grid: the rate that is best on
held-out training images of the digits, which are public, for a clipping and a K (for more than four copies, the one of
four), serves for MNIST as well. The budget pays for all that a step releases: for adaptive clipping, gradients and
counts together.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import pegrad
import plotting
import report
import runner
from pegrad import accounting, optim, random, trees
from pegrad.adaptive import Adaptive
from pegrad.clipping import Automatic, Clipping, Flat, PerLayer
from pegrad.papers import data, models, training
from pegrad.papers.data import Dataset
from pegrad.papers.models import Model
from pegrad.per_example import Loss
from pegrad.sampling import PoissonSampler
from pegrad.trees import PyTree
from runner import Effort, Point, Results

EPSILON, CLIP_NORM, MOMENTUM = 3.0, 1.0, 0.9
HELD_OUT = 287  # a fifth of the digits' training images
_MOST_COPIES = 4  # for which a learning rate is looked for


def adaptive(batch_size: float) -> Adaptive:
    """Follow the median, as Andrew et al. 2021 propose: the counts' noise is a tenth of the batch."""
    return Adaptive(CLIP_NORM, count_noise_multiplier=batch_size / 10)


CLIPPINGS: dict[str, Callable[[float], Clipping | Adaptive]] = {
    "flat": lambda _: Flat(CLIP_NORM),
    "per layer": lambda _: PerLayer(CLIP_NORM),
    "automatic": lambda _: Automatic(CLIP_NORM),
    "adaptive": adaptive,
}
"""By name, from the expected batch size to the clipping."""


class Recipe(NamedTuple):
    """What is the same for every clipping on one data set."""

    sampling_rate: float
    epochs: float
    delta: float
    reach: int
    """The longest shift, in pixels."""
    background: float
    """What a shift moves in."""
    copies: Sequence[int]
    """K, one after the other."""


class Scale(NamedTuple):
    """What a scale runs."""

    digits: Recipe
    mnist: Recipe
    rates: Sequence[float]
    scaled_down: str


_DIGITS = Recipe(256 / 1437, 30, 1e-4, 1, 0.0, copies=(1, 4, 16))
_MNIST = Recipe(2048 / 60_000, 20, 1e-5, 2, -data.MNIST_MEAN / data.MNIST_STD, copies=(1, 4, 16))
_RATES = 0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1
SCALES = {
    "smoke": Scale(
        _DIGITS._replace(epochs=0.5, copies=(1, 4)),
        _MNIST._replace(sampling_rate=64 / 60_000, epochs=0.005, copies=(1, 4)),
        _RATES[:2],
        "half an epoch (MNIST: 5 steps of 64), 1 seed, 2 learning rates, K up to 4",
    ),
    "cpu": Scale(
        _DIGITS,
        _MNIST._replace(sampling_rate=64 / 60_000, epochs=1 / 12),
        _RATES,
        "MNIST: a twelfth of an epoch, in batches of 64",
    ),
    "full": Scale(_DIGITS, _MNIST, _RATES, "nothing"),
}
EFFORTS = {"smoke": Effort(rounds=1), "cpu": Effort(rounds=5), "full": Effort(rounds=5)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("Accuracy at one epsilon, by clipping and augmentation multiplicity.", EFFORTS)
    parser.add_argument("--data", type=Path, help="folder of MNIST's four files; without it, the digits alone")
    options = runner.parse(parser, argv)
    scale, seeds = SCALES[options.scale], range(options.effort.rounds)
    recipes = {"digits": scale.digits} | ({"mnist": scale.mnist} if options.data else {})

    @cache
    def dataset(name: str) -> Dataset:
        loaded = data.load_digits() if name == "digits" else data.load_mnist(options.data)
        tensors = {field: t.to(options.device) for field, t in loaded._asdict().items() if isinstance(t, Tensor)}
        return loaded._replace(**tensors)

    def choose(clipping: str, copies: int, rate: float) -> Point:
        return fit(held_out(dataset("digits"), HELD_OUT), scale.digits, clipping, rate, copies, seed=0)

    def run(name: str, clipping: str, copies: int, seed: int) -> Point:
        tried = {rate: _choice_key(min(copies, _MOST_COPIES), clipping, rate) for rate in scale.rates}
        rate = max(tried, key=lambda rate: results[tried[rate]]["accuracy"])
        return fit(dataset(name), recipes[name], clipping, rate, copies, seed)

    stem = options.out / f"accuracy_{options.scale}_{options.device}"
    settings = {
        "epsilon": EPSILON,
        "clip_norm": CLIP_NORM,
        "momentum": MOMENTUM,
        "seeds": len(seeds),
        **scale._asdict(),
        "digits": scale.digits._asdict(),
        "mnist": scale.mnist._asdict(),
    }
    results = Results(stem.with_suffix(".json"), settings, options.device, fresh=options.fresh)
    points = {
        _choice_key(copies, clipping, rate): partial(choose, clipping, copies, rate)
        for copies in scale.digits.copies
        if copies <= _MOST_COPIES
        for clipping in CLIPPINGS
        for rate in scale.rates
    }
    points |= {
        _key(name, clipping, copies, seed): partial(run, name, clipping, copies, seed)
        for name, recipe in recipes.items()
        for copies in recipe.copies
        for clipping in CLIPPINGS
        for seed in seeds
    }
    runner.run(points, results)
    found = {
        name: {
            clipping: [(k, [results[_key(name, clipping, k, seed)] for seed in seeds]) for k in recipe.copies]
            for clipping in CLIPPINGS
        }
        for name, recipe in recipes.items()
    }
    _show(found, recipes)
    panels = {
        name: {clipping: [(k, [run["accuracy"] for run in runs]) for k, runs in own] for clipping, own in lines.items()}
        for name, lines in found.items()
    }
    note = f"seeds: {len(seeds)}; marks: means, bars: least and greatest\n{results.where()}"
    plotting.accuracy_by_copies(panels, f"Test accuracy at ε = {EPSILON:g}", note).savefig(stem.with_suffix(".png"))
    print(f"{stem}.json, {stem}.png")


def fit(dataset: Dataset, recipe: Recipe, clipping: str, rate: float, copies: int, seed: int) -> Point:
    """Train within the budget.

    Args:
        dataset: what to train and to test on.
        recipe: how, whatever the clipping.
        clipping: a key of `CLIPPINGS`.
        rate: SGD's learning rate.
        copies: K >= 1.
        seed: of the run; the same parameters and batches for every clipping.

    Returns:
        `accuracy` on the test images, `rate`, `noise_multiplier`, `steps`, `seconds`, and `bounds`, the adaptive clip
        norms at the end, which are released.
    """
    size = len(dataset.train_labels)
    sampler = PoissonSampler(size, recipe.sampling_rate)
    steps = max(1, round(recipe.epochs / recipe.sampling_rate))
    noise_multiplier = _noise_multiplier(recipe.delta, recipe.sampling_rate, steps)
    model = models.mnist_cnn(image_size=dataset.train_images.shape[-1], num_classes=dataset.num_classes)
    step = pegrad.dp_sgd(
        mean_cross_entropy(model),
        optim.sgd(rate, momentum=MOMENTUM),
        clip_norm=CLIPPINGS[clipping](sampler.expected_batch_size),
        noise_multiplier=noise_multiplier,
        expected_batch_size=sampler.expected_batch_size,
        sampler=sampler,
    )
    init_key, sampler_key, state_key, shift_key = random.split(random.key(seed), 4)
    params = trees.map(lambda leaf: leaf.to(dataset.train_images.device), model.init(init_key))
    state = step.init(params, state_key)
    start = perf_counter()
    for index in range(steps):
        draw = sampler(sampler_key, index)
        rows = draw.indices[draw.mask].to(dataset.train_images.device)
        key = random.fold_in(shift_key, index)
        images = shifted(key, dataset.train_images[rows], copies, recipe.reach, recipe.background)
        params, state, _ = step(params, state, (images, dataset.train_labels[rows]))
    return {
        "accuracy": training.accuracy(model, params, dataset.test_images, dataset.test_labels),
        "rate": rate,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "seconds": perf_counter() - start,
        "bounds": list(state.bounds),
    }


def mean_cross_entropy(model: Model) -> Loss:
    """Make the loss of one example, K images `(K, C, H, W)` of one class: the mean over them."""
    logits = torch.func.vmap(model.apply, (None, 0))

    def loss(params: PyTree, example: tuple[Tensor, Tensor]) -> Tensor:
        images, label = example
        return F.cross_entropy(logits(params, images), label.expand(len(images)))

    return loss


def shifted(key: Tensor, images: Tensor, copies: int, reach: int, background: float) -> Tensor:
    """Copy images `(B, C, H, W)` to `(B, K, C, H, W)`: the first copies as they are, the others moved by up to `reach`.

    Every shift of a whole number of pixels in each direction is as likely as another; `background` moves in.
    """
    count, channels, height, width = images.shape
    drawn = random.uniform(key, (count, copies, 2), device=images.device)
    corner = (drawn * (2 * reach + 1)).long().clamp(max=2 * reach)
    corner[:, 0] = reach
    padded = F.pad(images, (reach,) * 4, value=background)
    place = partial(torch.arange, device=images.device)
    y = corner[..., 0, None] + place(height)
    x = corner[..., 1, None] + place(width)
    which = place(count)[:, None, None, None, None], place(channels)[:, None, None]
    return padded[*which, y[:, :, None, :, None], x[:, :, None, None, :]]


def held_out(dataset: Dataset, count: int) -> Dataset:
    """Test on the last training images; the test set is left out."""
    images, labels = dataset.train_images, dataset.train_labels
    return dataset._replace(
        train_images=images[:-count],
        train_labels=labels[:-count],
        test_images=images[-count:],
        test_labels=labels[-count:],
    )


@cache
def _noise_multiplier(delta: float, sampling_rate: float, steps: int) -> float:
    # How many examples there are does not enter the cost of a Poisson draw.
    return accounting.noise_multiplier_for(EPSILON, delta, PoissonSampler(1, sampling_rate), steps)


def _choice_key(copies: int, clipping: str, rate: float) -> str:
    return f"choice/K={copies}/{clipping}/{rate}"


def _key(name: str, clipping: str, copies: int, seed: int) -> str:
    return f"{name}/K={copies}/{clipping}/{seed}"


def _show(found: Mapping[str, Mapping[str, list[tuple[int, list[Point]]]]], recipes: Mapping[str, Recipe]) -> None:
    console = Console(width=100)
    for name, lines in found.items():
        title = f"{name}: test accuracy at ε = {EPSILON:g}, δ = {recipes[name].delta:g}; mean ± deviation of the seeds"
        copies = [f"K = {k}" for k, _ in next(iter(lines.values()))]
        table = report.table(title, "clipping", "rates", *copies, "seconds a run")
        for clipping, own in lines.items():
            accuracies = [[run["accuracy"] for run in runs] for _, runs in own]
            shown = [f"{mean(each):.1%}" + (f" ± {stdev(each):.1%}" if len(each) > 1 else "") for each in accuracies]
            seconds = " / ".join(f"{mean(run['seconds'] for run in runs):.0f}" for _, runs in own)
            rates = " / ".join(f"{runs[0]['rate']:g}" for _, runs in own)
            table.add_row(clipping, rates, *shown, seconds)
        console.print(table)


if __name__ == "__main__":
    main()
