"""`python -m pegrad train`: a whole run, watched, then written down."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from math import ceil, isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

import pegrad
from pegrad import random, trees
from pegrad.cli.tables import timings
from pegrad.clipping import as_clipping
from pegrad.papers import comparison, data, plots
from pegrad.papers.data import Dataset
from pegrad.papers.training import (
    PRESETS,
    Evaluation,
    Plan,
    Privacy,
    Settings,
    cross_entropy,
    evaluate,
    make_plan,
    steps,
)
from pegrad.trees import PyTree

_EVALUATIONS = 10
_ROUNDS = 3
_NOT_PRIVATE = (
    "Losses and norms, here and in training.png, are those of single training examples: no guarantee covers them. "
    "Nor does epsilon cover a choice of settings made by looking at results."
)
_SEEDED = "Whoever knows or guesses the seed can subtract the noise: this run is not private."


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    params: PyTree
    history: list[Evaluation]
    losses: list[float]
    """Each step's mean loss."""
    norms: list[Tensor]
    """Each step's gradient norms `(B,)`; `(0,)` without privacy."""
    seconds: float


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: a setting out of its bounds, a data file that is missing or wrong, or a missing package.
    """
    console = Console(markup=False, highlight=False)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is better known before the run
    dataset = _load(options)
    settings, privacy = _settings(options)
    plan = make_plan(settings, privacy, dataset)
    title = _title(plan, settings, privacy, dataset)
    console.print(title)
    console.print(_source_of_randomness(options.seed))
    outcome = _watch(plan, dataset, random.key(options.seed))
    console.print(_result(outcome, privacy))
    rows = _time_strategies(plan, dataset, outcome.params, settings.batch_size)
    console.print(timings(f"clipped gradients of {settings.batch_size} examples, by strategy", rows))
    if options.out is not None:
        report = _report(options, settings, privacy, plan, outcome) | {"timings": [row._asdict() for row in rows]}
        for path in _write(options.out, report, _picture(outcome, privacy, title)):
            console.print(f"wrote {path}")


def _load(options: argparse.Namespace) -> Dataset:
    dataset = data.load_mnist(options.data_dir) if options.data == "mnist" else _centred_digits()
    return trees.map(lambda leaf: leaf.to(options.device) if isinstance(leaf, Tensor) else leaf, dataset)


def _centred_digits() -> Dataset:
    """Load the digits with pixels in [-1, 1]: the network learns them sooner than those in [0, 1]."""
    digits = data.load_digits()
    return digits._replace(train_images=2 * digits.train_images - 1, test_images=2 * digits.test_images - 1)


def _settings(options: argparse.Namespace) -> tuple[Settings, Privacy | None]:
    """Put the options that were given in the place of the data set's defaults."""
    settings, privacy = PRESETS[options.data]
    settings = replace(settings, **_given(options, Settings))
    if not options.dp:
        return settings, None
    changes = _given(options, Privacy)
    if not changes.keys().isdisjoint({"epsilon", "noise_multiplier"}):
        changes = {"epsilon": None, "noise_multiplier": None} | changes
    return settings, replace(privacy, **changes)


def _given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _watch(plan: Plan, dataset: Dataset, key: Tensor) -> Outcome:
    """Train under a progress bar, evaluating now and then."""
    history: list[Evaluation] = []
    losses: list[float] = []
    norms: list[Tensor] = []
    shown: dict[str, str] = {}
    every = ceil(plan.steps / _EVALUATIONS)
    start = perf_counter()
    with tqdm(steps(plan, dataset, key), total=plan.steps, desc="training", unit="step") as bar:
        for taken in bar:
            losses.append(taken.metrics.mean_loss.item())
            norms.append(taken.metrics.whole_norms.cpu())
            if taken.state.step % every == 0 or taken.state.step == plan.steps:
                history.append(evaluate(plan, dataset, taken))
                shown = _shown(history[-1])
            bar.set_postfix({"loss": f"{losses[-1]:.3f}", **shown}, refresh=False)
    return Outcome(taken.params, history, losses, norms, perf_counter() - start)


def _time_strategies(plan: Plan, dataset: Dataset, params: PyTree, batch_size: int) -> list[comparison.Row]:
    batch = dataset.train_images[:batch_size], dataset.train_labels[:batch_size]
    return comparison.compare(cross_entropy(plan.model), params, batch, question="clipped", repeats=_ROUNDS)


def _shown(evaluation: Evaluation) -> dict[str, str]:
    spent = {} if evaluation.epsilon is None else {"ε": f"{evaluation.epsilon:.2f}"}
    return {"test": f"{evaluation.test_accuracy:.1%}", **spent}


def _title(plan: Plan, settings: Settings, privacy: Privacy | None, dataset: Dataset) -> str:
    how = f"batches of {settings.batch_size}, {plan.steps} steps, Adam at {settings.lr:g}"
    if privacy is None:
        return f"{dataset.name}, without privacy: {how}"
    return (
        f"{dataset.name}, DP-SGD: Poisson {how}, clip norm {as_clipping(privacy.clip_norm).sensitivity:g}, "
        f"noise multiplier {plan.noise_multiplier:.3g}"
    )


def _source_of_randomness(seed: int | None) -> str:
    if seed is None:
        return "key: from the operating system's entropy, not kept"
    return f"key: from seed {seed}, to repeat an experiment. {_SEEDED}"


def _result(outcome: Outcome, privacy: Privacy | None) -> str:
    last = outcome.history[-1]
    price = "" if privacy is None else f" at ε = {last.epsilon:.2f}, δ = {privacy.delta:g}"
    return f"test accuracy {last.test_accuracy:.2%}{price}, after {outcome.seconds:.1f} s"


def _picture(outcome: Outcome, privacy: Privacy | None, title: str) -> Figure:
    if privacy is None:
        return plots.plain_training(outcome.history, outcome.losses, title)
    return plots.private_training(outcome.history, outcome.norms, as_clipping(privacy.clip_norm).sensitivity, title)


def _report(
    options: argparse.Namespace, settings: Settings, privacy: Privacy | None, plan: Plan, outcome: Outcome
) -> dict[str, Any]:
    """Gather what `metrics.json` tells, but for the timings of the strategies."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pegrad": pegrad.__version__,
        "machine": {**comparison.machine(), "device": str(options.device)},
        "not_private": _NOT_PRIVATE if options.seed is None else f"{_NOT_PRIVATE} {_SEEDED}",
        "data": options.data,
        "seeded": options.seed is not None,
        "settings": {**asdict(settings), "steps": plan.steps},
        "privacy": privacy and {**asdict(privacy), "noise_multiplier": plan.noise_multiplier, "accountant": "pld"},
        "seconds": outcome.seconds,
        "history": _history(outcome),
    }


def _history(outcome: Outcome) -> list[dict[str, Any]]:
    """Join each evaluation with what the steps since the one before it saw."""
    records = []
    start = 0
    for evaluation in outcome.history:
        losses, norms = outcome.losses[start : evaluation.step], torch.cat(outcome.norms[start : evaluation.step])
        record = {**evaluation._asdict(), "train_loss": torch.tensor(losses).nanmean().item()}
        if len(norms):
            record["median_norm"] = norms.median().item()
        records.append(record)
        start = evaluation.step
    return records


def _write(folder: Path, report: Mapping[str, Any], picture: Figure) -> tuple[Path, Path]:
    metrics, image = folder / "metrics.json", folder / "training.png"
    metrics.write_text(json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    picture.savefig(image)
    return metrics, image


def _finite(value: Any) -> Any:
    """Put null in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
