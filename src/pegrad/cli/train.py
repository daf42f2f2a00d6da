"""`python -m pegrad train`: a whole run, watched, then written down."""

import argparse
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from functools import partial
from math import ceil, isfinite
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

import pegrad
from pegrad import random, trees
from pegrad.adaptive import Adaptive
from pegrad.cli import checkpoints, parallel
from pegrad.cli.checkpoints import Checkpoint
from pegrad.cli.tables import timings
from pegrad.clipping import Clipping, as_clipping
from pegrad.errors import ArgumentError
from pegrad.papers import comparison, data, plots
from pegrad.papers.data import Dataset
from pegrad.papers.training import (
    CLIPPINGS,
    PRESETS,
    Evaluation,
    Plan,
    Privacy,
    Settings,
    begin,
    cross_entropy,
    evaluate,
    make_plan,
    remaining,
)
from pegrad.trees import PyTree

if TYPE_CHECKING:
    from pegrad.distributed.groups import Group

_EVALUATIONS = 10
_ROUNDS = 3
_NOT_PRIVATE = (
    "Losses and norms, here and in training.png, are those of single training examples: no guarantee covers them. "
    "Nor does epsilon cover a choice of settings made by looking at results."
)
_SEEDED = "Whoever knows or guesses the seed can subtract the noise: this run is not private."


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: a setting out of its bounds, a data file that is missing or wrong, or a missing package.
    """
    with parallel.ranks(options.device) as group:
        _run(options, group)


def _run(options: argparse.Namespace, group: "Group | None") -> None:
    first = group is None or group.rank == 0  # the others work, and are silent
    console = Console(markup=False, highlight=False, quiet=not first)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is better known before the run
    dataset = _load(options)
    settings, privacy = _settings(options)
    plan = make_plan(settings, privacy, dataset)
    if group is not None:
        plan = parallel.shared(plan)
    title = _title(plan, settings, privacy, dataset)
    start = _start(options, settings, privacy, plan, dataset, group)
    console.print(title)
    if group is not None:
        console.print(f"{group.size} processes share every batch; losses and norms are those of the first one's part")
    console.print(_source_of_randomness(options, start))
    if not first:
        deque(remaining(plan, dataset, start.progress), maxlen=0)
        return
    keep = partial(checkpoints.save, options.out) if options.out is not None else _keep_nothing
    outcome = _watch(plan, dataset, start, keep)
    console.print(_result(outcome, privacy))
    rows = _time_strategies(plan, dataset, outcome.progress.params, settings.batch_size)
    console.print(timings(f"clipped gradients of {settings.batch_size} examples, by strategy", rows))
    if options.out is not None:
        report = _report(options, settings, privacy, plan, outcome) | {"timings": [row._asdict() for row in rows]}
        for path in _write(options.out, report, _picture(outcome, title)):
            console.print(f"wrote {path}")
        checkpoints.discard(options.out)


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
    privacy = replace(privacy, **changes)
    if options.clipping is not None:
        assert isinstance(privacy.clip_norm, float), "presets and --clip-norm give a number"
        clipping = CLIPPINGS[options.clipping](privacy.clip_norm, settings.batch_size)
        privacy = replace(privacy, clip_norm=_adapted(options, clipping))
    return settings, privacy


def _adapted(options: argparse.Namespace, clipping: float | Clipping | Adaptive) -> float | Clipping | Adaptive:
    """Put the options of adaptive clipping that were given in the place of its defaults."""
    if not isinstance(clipping, Adaptive):
        return clipping
    values = {
        "quantile": options.quantile,
        "count_noise_multiplier": options.count_noise_multiplier,
        "learning_rate": options.clip_learning_rate,
    }
    return replace(clipping, **{name: value for name, value in values.items() if value is not None})


def _given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _start(
    options: argparse.Namespace,
    settings: Settings,
    privacy: Privacy | None,
    plan: Plan,
    dataset: Dataset,
    group: "Group | None",
) -> Checkpoint:
    """Begin a run, or take up the one that was cut off.

    Raises:
        ArgumentError: what is asked for is not in the folder, or what is there was not asked for.
        DataFileError: see `checkpoints.load`.
    """
    facts = _facts(options, settings, privacy, plan, dataset)
    key: Tensor = random.key(options.seed)
    if group is not None:  # bits depend on how a batch is cut, and a step that is taken again must be the same one
        facts["processes"] = group.size
        key = parallel.common_key(group, key)
    begun = begin(plan, dataset, key)
    if not options.resume:
        if options.out is not None:
            checkpoints.refuse_to_overwrite(options.out)
        return Checkpoint(facts, options.seed is not None, begun, [], [], [], 0.0)
    past = checkpoints.load(options.out, facts)
    if options.seed is not None and not torch.equal(begun.sampler_key, past.progress.sampler_key):
        raise ArgumentError(
            f"The run in {options.out} was not started with this seed; leave out --seed to go on with it"
        )
    return past


def _watch(plan: Plan, dataset: Dataset, past: Checkpoint, keep: Callable[[Checkpoint], None]) -> Checkpoint:
    """Train under a progress bar, evaluating and keeping the run now and then."""
    now = past
    history, losses, norms = [*past.history], [*past.losses], [*past.norms]
    shown: dict[str, str] = {}
    every = ceil(plan.steps / _EVALUATIONS)
    epoch = ceil(len(dataset.train_labels) / past.settings["batch_size"])
    start = perf_counter() - past.seconds
    left = remaining(plan, dataset, past.progress)
    with tqdm(left, total=plan.steps, initial=past.progress.state.step, desc="training", unit="step") as bar:
        for taken in bar:
            count = taken.state.step
            losses.append(taken.metrics.mean_loss.item())
            norms.append(taken.metrics.whole_norms.cpu())
            if evaluated := count % every == 0 or count == plan.steps:
                history.append(evaluate(plan, dataset, taken))
                shown = _shown(history[-1])
            if evaluated or count % epoch == 0:
                progress = past.progress._replace(params=taken.params, state=taken.state)
                now = Checkpoint(
                    past.settings, past.seeded, progress, [*history], [*losses], [*norms], perf_counter() - start
                )
                keep(now)
            bar.set_postfix({"loss": f"{losses[-1]:.3f}", **shown}, refresh=False)
    return now  # the last step is always kept


def _keep_nothing(checkpoint: Checkpoint) -> None:
    """Keep a run that has no folder."""


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
    clipping = _clipping(privacy)
    return (
        f"{dataset.name}, DP-SGD: Poisson {how}, {clipping['name']} clip norm {clipping['clip_norm']:g}, "
        f"noise multiplier {plan.noise_multiplier:.3g}"
    )


def _source_of_randomness(options: argparse.Namespace, start: Checkpoint) -> str:
    if options.resume:
        source = f"key: that of the run in {options.out}, which goes on after step {start.progress.state.step}."
        return f"{source} {_SEEDED}" if start.seeded else source
    if options.seed is not None:
        return f"key: from seed {options.seed}, to repeat an experiment. {_SEEDED}"
    if options.out is None:
        return "key: from the operating system's entropy, not kept"
    return f"key: from the operating system's entropy, kept in {checkpoints.NAME} until the run is over: a secret"


def _result(outcome: Checkpoint, privacy: Privacy | None) -> str:
    last = outcome.history[-1]
    price = "" if privacy is None else f" at ε = {last.epsilon:.2f}, δ = {privacy.delta:g}"
    return f"test accuracy {last.test_accuracy:.2%}{price}, after {outcome.seconds:.1f} s"


def _picture(outcome: Checkpoint, title: str) -> Figure:
    clip_norm = outcome.history[-1].clip_norm
    if clip_norm is None:
        return plots.plain_training(outcome.history, outcome.losses, title)
    return plots.private_training(outcome.history, outcome.norms, clip_norm, title)


def _facts(
    options: argparse.Namespace, settings: Settings, privacy: Privacy | None, plan: Plan, dataset: Dataset
) -> dict[str, Any]:
    """Gather what determines a run beside its key, by name: a run that goes on must have all of it alike."""
    where = {"data": options.data, "examples": len(dataset.train_labels), "device": str(options.device)}
    return {**where, "dp": privacy is not None, **_training(settings, plan), **(_privacy(privacy, plan) or {})}


def _training(settings: Settings, plan: Plan) -> dict[str, Any]:
    return {**asdict(settings), "steps": plan.steps}


def _privacy(privacy: Privacy | None, plan: Plan) -> dict[str, Any] | None:
    if privacy is None:
        return None
    numbers = {field.name: getattr(privacy, field.name) for field in fields(privacy) if field.name != "clip_norm"}
    return {**numbers, "noise_multiplier": plan.noise_multiplier, "clipping": _clipping(privacy)}


def _clipping(privacy: Privacy) -> dict[str, str | float]:
    """Describe a clipping by its name and its numbers."""
    clip_norm = privacy.clip_norm
    clipping = clip_norm if isinstance(clip_norm, Adaptive) else as_clipping(clip_norm)
    numbers = {name: value for name, value in vars(clipping).items() if isinstance(value, int | float)}
    return {"name": type(clipping).__name__, **numbers}


def _report(
    options: argparse.Namespace, settings: Settings, privacy: Privacy | None, plan: Plan, outcome: Checkpoint
) -> dict[str, Any]:
    """Gather what `metrics.json` tells, but for the timings of the strategies."""
    spent = _privacy(privacy, plan)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pegrad": pegrad.__version__,
        "machine": {**comparison.machine(), "device": str(options.device)},
        "not_private": f"{_NOT_PRIVATE} {_SEEDED}" if outcome.seeded else _NOT_PRIVATE,
        "data": options.data,
        "seeded": outcome.seeded,
        "settings": _training(settings, plan),
        "privacy": spent and {**spent, "accountant": "pld"},
        "seconds": outcome.seconds,
        "history": _history(outcome),
    }


def _history(outcome: Checkpoint) -> list[dict[str, Any]]:
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
