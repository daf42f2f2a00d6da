"""The command line from end to end: what it prints, what it writes, and what it says when it cannot."""

import gzip
import io
import json
import os
import stat
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import pegrad
from pegrad import random, trees
from pegrad.__main__ import main
from pegrad.cli import checkpoints
from pegrad.cli import train as command
from pegrad.cli.arguments import parse
from pegrad.cli.networks import build
from pegrad.papers.comparison import BASELINE
from pegrad.papers.training import CLIPPINGS, Progress
from pegrad.rules.conv import KERNELS
from pegrad.strategies import STRATEGIES

TINY = ("--batch-size", "32", "--epochs", "0.06")  # three steps on the digits


def train(folder: Path, *options: str) -> dict:
    assert main(["train", *TINY, *options, "--out", str(folder)]) == 0
    return json.loads((folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def refused(capsys: pytest.CaptureFixture, *options: str) -> str:
    """Expect a usage error, and return what it says."""
    with pytest.raises(SystemExit) as exit:
        main([*options])
    assert exit.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def failed(capsys: pytest.CaptureFixture, *options: str) -> str:
    """Expect a failure, and return the one line that says why."""
    assert main([*options]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pegrad: ")
    return lines[0]


def test_private_training_writes_metrics_and_a_picture(tmp_path, capsys):
    """Catches: a file that is not written, epsilon that stays, timings or settings that are left out."""
    larger = ("--batch-size", "128", "--epochs", "0.25")
    report = train(tmp_path / "new" / "folder", "--seed", "3", "--epsilon", "6", *larger)
    out = capsys.readouterr().out
    assert "seed 3" in out
    assert "this run is not private" in out
    assert "δ = 0.0001" in out
    assert all(name in out for name in (BASELINE, *STRATEGIES))
    assert report["settings"] == {"batch_size": 128, "epochs": 0.25, "lr": 0.005, "steps": 3}
    assert report["privacy"]["epsilon"] == 6
    assert report["privacy"]["noise_multiplier"] > 0
    assert report["seeded"] is True
    assert "no guarantee" in report["not_private"]
    assert "seed can subtract the noise" in report["not_private"]
    assert [point["step"] for point in report["history"]] == [1, 2, 3]
    spent = [point["epsilon"] for point in report["history"]]
    assert spent == sorted(set(spent))
    assert 5.9 < spent[-1] <= 6
    assert all(0 <= point["test_accuracy"] <= 1 and point["train_loss"] > 0 for point in report["history"])
    assert [row["name"] for row in report["timings"]] == [BASELINE, *STRATEGIES]
    picture = matplotlib.image.imread(tmp_path / "new" / "folder" / "training.png")
    assert picture.shape[0] > 400
    assert picture.std() > 0.05


def test_plain_training_has_no_epsilon(tmp_path, capsys):
    report = train(tmp_path, "--no-dp", "--seed", "0")
    assert report["privacy"] is None
    assert "ε" not in capsys.readouterr().out
    assert {point["epsilon"] for point in report["history"]} == {None}
    assert "median_norm" not in report["history"][0]
    assert (tmp_path / "training.png").stat().st_size > 0


def test_a_seed_repeats_the_run(tmp_path, no_timings):
    """Catches: randomness beside the key, and a key that does not depend on the seed."""
    options = ("--noise-multiplier", "20", "--strategy", "vmap", "--microbatch-size", "7")
    first, again, other = (
        train(tmp_path / name, *options, "--seed", seed) for name, seed in (("a", "5"), ("b", "5"), ("c", "6"))
    )
    assert first["history"] == again["history"]
    assert first["history"] != other["history"]


def test_the_seed_is_in_no_file(tmp_path, no_timings):
    """Catches: a seed that is published with the results, and with it the noise of the run."""
    train(tmp_path, "--seed", "918273645", "--noise-multiplier", "20")
    for path in tmp_path.iterdir():
        assert b"918273645" not in path.read_bytes()


def test_without_a_seed_no_two_runs_are_alike(tmp_path, no_timings, capsys):
    """Catches: a default seed, with which anybody could take the noise away."""
    first, second = (train(tmp_path / name, "--noise-multiplier", "0") for name in "ab")
    assert "operating system's entropy" in capsys.readouterr().out
    assert first["seeded"] is False
    assert "not private:" not in first["not_private"]
    assert first["history"] != second["history"]


def test_no_noise_is_null_in_json(tmp_path):
    """Catches: Infinity, which is no JSON."""
    assert train(tmp_path, "--noise-multiplier", "0")["history"][-1]["epsilon"] is None


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--no-dp"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CLIPPINGS)
def test_every_clipping_trains_and_is_written_down(name, tmp_path, no_timings, capsys):
    """Catches: an option that is ignored; a clipping that is no JSON; adaptive bounds that stand still."""
    report = train(tmp_path, "--clipping", name, "--clip-norm", "0.7", "--noise-multiplier", "0")
    numbers = {
        "flat": {"name": "Flat", "clip_norm": 0.7},
        "per_layer": {"name": "PerLayer", "clip_norm": 0.7},
        "automatic": {"name": "Automatic", "clip_norm": 0.7, "gamma": 0.01},
        "adaptive": {
            "name": "Adaptive",
            "clip_norm": 0.7,
            "count_noise_multiplier": 3.2,
            "quantile": 0.5,
            "learning_rate": 0.2,
        },
    }
    assert report["privacy"]["clipping"] == numbers[name]
    assert f"{numbers[name]['name']} clip norm 0.7" in " ".join(capsys.readouterr().out.split())
    assert len({point["clip_norm"] for point in report["history"]}) == (3 if name == "adaptive" else 1)


@pytest.mark.slow
def test_adaptive_clipping_takes_its_numbers(tmp_path, no_timings, capsys):
    """Catches: an option that is ignored, or taken for another; counts that alone would spend the budget."""
    options = ("--clipping", "adaptive", "--clip-norm", "0.7", "--seed", "1")
    numbers = ("--quantile", "0.75", "--count-noise-multiplier", "2.5", "--clip-learning-rate", "0.125")
    report = train(tmp_path / "a", *options, *numbers, "--noise-multiplier", "1.5")
    assert report["privacy"]["clipping"] == {
        "name": "Adaptive",
        "clip_norm": 0.7,
        "count_noise_multiplier": 2.5,
        "quantile": 0.75,
        "learning_rate": 0.125,
    }
    bounds = [
        [point["clip_norm"] for point in train(tmp_path / name, *options, "--noise-multiplier", "0", *one)["history"]]
        for name, *one in (("b",), ("c", "--quantile", "1"), ("d", "--quantile", "1", "--clip-learning-rate", "0.1"))
    ]
    middle, widest, slower = (path[-1] / path[0] for path in bounds)
    assert middle < widest
    assert 1 < slower < widest
    capsys.readouterr()
    too_little = ("--noise-multiplier", "1.5", "--count-noise-multiplier", "1.5")
    assert "the counts alone would spend the budget" in failed(capsys, "train", *TINY, *options, *too_little)


# Eight steps, kept after 3 and 6, which are epochs, and after 4 and 8, where they are evaluated.
LONGER = ("--batch-size", "512", "--epochs", "2.5", "--seed", "4")


@pytest.fixture
def no_timings(monkeypatch):
    """Leave out the comparison of the strategies, which is most of a small run's time."""
    monkeypatch.setattr(command, "_time_strategies", lambda *_: [])
    monkeypatch.setattr(command, "timings", lambda *_: "")


@pytest.fixture
def seen(monkeypatch):
    """Let a run be cut off before it evaluates the step `seen["cut"]`, and keep every step that it evaluates."""
    steps = {"cut": None}
    evaluate = command.evaluate

    def watched(plan, dataset, taken):
        if taken.state.step == steps["cut"]:
            raise KeyboardInterrupt
        steps[taken.state.step] = taken
        return evaluate(plan, dataset, taken)

    monkeypatch.setattr(command, "evaluate", watched)
    monkeypatch.setattr(command, "_EVALUATIONS", 2)
    return steps


def cut_off(seen: dict, folder: Path, *options: str) -> None:
    seen["cut"] = 4
    with pytest.raises(KeyboardInterrupt):
        main(["train", *LONGER, *options, "--out", str(folder)])
    seen["cut"] = None


@pytest.mark.parametrize(
    "options",
    [
        ("--clipping", "adaptive", "--noise-multiplier", "1"),
        pytest.param(
            ("--clipping", "per_layer", "--noise-multiplier", "0", "--microbatch-size", "100"), marks=pytest.mark.slow
        ),
        ("--no-dp",),
    ],
)
def test_a_run_that_was_cut_off_goes_on(options, tmp_path, no_timings, seen, capsys):
    """Catches: other bits than those of the whole run, epsilon of the second part alone, a history with a gap."""
    whole = train(tmp_path / "whole", *LONGER, *options)
    last = seen[8]
    cut_off(seen, tmp_path / "cut", *options)
    for step in [step for step in seen if step != "cut"]:
        del seen[step]
    capsys.readouterr()
    rest = train(tmp_path / "cut", *LONGER[:-2], *options, "--resume")
    assert "goes on after step 3" in " ".join(capsys.readouterr().out.split())
    assert sorted(step for step in seen if step != "cut") == [4, 8]
    for ours, theirs in zip(trees.leaves(seen[8].params), trees.leaves(last.params), strict=True):
        assert torch.equal(ours, theirs)
    assert seen[8].state.ledger == last.state.ledger
    assert rest["history"] == whole["history"]
    assert rest["privacy"] == whole["privacy"]
    assert rest["seeded"] is True
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["metrics.json", "training.png"]


def test_a_run_goes_on_as_it_was_started_or_not_at_all(tmp_path, no_timings, seen, capsys):
    """Catches: settings of another run under this one's epsilon; a run in another's place, unpaid for."""
    folder = tmp_path / "run"
    cut_off(seen, folder, "--noise-multiplier", "0")
    capsys.readouterr()
    same = ("train", *LONGER, "--noise-multiplier", "0", "--out", str(folder))
    assert "cut off" in failed(capsys, *same)
    assert "with this seed" in failed(capsys, *same, "--seed", "5", "--resume")
    assert "lr 0.005, not 0.1" in failed(capsys, *same, "--lr", "0.1", "--resume")
    assert "noise_multiplier 0.0, not 2.0" in failed(capsys, *same, "--noise-multiplier", "2", "--resume")
    assert "'PerLayer'" in failed(capsys, *same, "--clipping", "per_layer", "--resume")
    assert "dp True, not False" in failed(capsys, "train", *LONGER, "--no-dp", "--out", str(folder), "--resume")
    assert "steps 8, not 9" in failed(capsys, *same, "--epochs", "3", "--resume")
    assert stat.S_IMODE((folder / checkpoints.NAME).stat().st_mode) == 0o600
    assert main([*same, "--resume"]) == 0
    capsys.readouterr()
    assert "no run to go on with" in failed(capsys, *same, "--resume")


@pytest.mark.parametrize(
    ("option", "was"),
    [
        (("--quantile", "0.6"), "'quantile': 0.75"),
        (("--count-noise-multiplier", "30"), "'count_noise_multiplier': 40.0"),
        (("--clip-learning-rate", "0.3"), "'learning_rate': 0.125"),
    ],
)
def test_adaptive_clipping_goes_on_by_its_own_numbers(option, was, tmp_path, no_timings, seen, capsys):
    """Catches: bounds that follow another quantile, or counts with other noise, after a run was cut off."""
    numbers = ("--quantile", "0.75", "--count-noise-multiplier", "40", "--clip-learning-rate", "0.125")
    options = ("--clipping", "adaptive", "--noise-multiplier", "1")
    cut_off(seen, tmp_path, *options, *numbers)
    capsys.readouterr()
    same = ("train", *LONGER, *options, *numbers, "--out", str(tmp_path), "--resume")
    message = failed(capsys, *same, *option)  # the last of two wins
    assert was in message
    assert option[1] in message


def test_a_run_without_a_seed_goes_on_by_its_own_key(tmp_path, no_timings, seen, capsys):
    """Catches: a new key for the second half."""
    options = ("--batch-size", "512", "--epochs", "2.5", "--noise-multiplier", "0")
    seen["cut"] = 4
    with pytest.raises(KeyboardInterrupt):
        main(["train", *options, "--out", str(tmp_path)])
    assert "secret" in capsys.readouterr().out
    key = torch.load(tmp_path / checkpoints.NAME, weights_only=True).progress.state.key
    seen["cut"] = None
    assert train(tmp_path, *options, "--resume")["seeded"] is False
    assert not (tmp_path / checkpoints.NAME).exists()
    assert torch.equal(key, seen[8].state.key)


def checkpoint(seconds: float) -> checkpoints.Checkpoint:
    state = pegrad.State(random.key(0), 1, ())
    return checkpoints.Checkpoint({"lr": 1.0}, False, Progress({}, state, random.key(1)), [], [], [], seconds)


@pytest.mark.parametrize("part", ["save", "fsync"])
def test_a_checkpoint_is_whole_whenever_writing_is_cut_off(part, tmp_path, monkeypatch):
    """Catches: a file that is written over in its place."""

    def cut(value, file):
        file.write(b"half")
        raise KeyboardInterrupt

    checkpoints.save(tmp_path, checkpoint(1.0))
    with monkeypatch.context() as patch:
        if part == "save":
            patch.setattr(torch, "save", cut)
        else:
            patch.setattr(os, "fsync", lambda _: cut(None, io.BytesIO()))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(tmp_path, checkpoint(2.0))
    assert checkpoints.load(tmp_path, {"lr": 1.0}).seconds == 1
    checkpoints.save(tmp_path, checkpoint(3.0))
    assert checkpoints.load(tmp_path, {"lr": 1.0}).seconds == 3
    checkpoints.discard(tmp_path)
    assert not list(tmp_path.glob("checkpoint*"))


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path, capsys):
    """Catches: code in a file that is run; a traceback."""
    resume = ("train", *TINY, "--noise-multiplier", "0", "--out", str(tmp_path), "--resume")
    for content in (Code(tmp_path / "ran"), {"settings": {}}):
        torch.save(content, tmp_path / checkpoints.NAME)
        assert "checkpoint" in failed(capsys, *resume)
    (tmp_path / checkpoints.NAME).write_bytes(b"half of one")
    assert "cannot be read" in failed(capsys, *resume)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "1", "--noise-multiplier", "1"], "not allowed with argument"),
        (["--no-dp", "--clip-norm", "1"], "--clip-norm: not allowed with --no-dp"),
        (["--no-dp", "--clipping", "flat"], "--clipping: not allowed with --no-dp"),
        (["--clipping", "soft"], "invalid choice: 'soft'"),
        (["--quantile", "0.5"], "--quantile: not allowed without --clipping adaptive"),
        (
            ["--clipping", "per_layer", "--count-noise-multiplier", "9"],
            "--count-noise-multiplier: not allowed without --clipping adaptive",
        ),
        (["--no-dp", "--clip-learning-rate", "1"], "--clip-learning-rate: not allowed without --clipping adaptive"),
        (["--clipping", "adaptive", "--quantile", "1.5"], "expected a number from 0 to 1, got '1.5'"),
        (["--clipping", "adaptive", "--clip-learning-rate", "0"], "expected a number > 0, got '0'"),
        (["--resume"], "--resume: needs --out"),
        (["--no-dp", "--noise-multiplier", "0"], "--noise-multiplier: not allowed with --no-dp"),
        (["--data-dir", "."], "--data-dir: not allowed with --data digits"),
        (["--data", "mnist"], "needs --data-dir, or PEGRAD_DATA"),
        (["--data", "cifar"], "invalid choice: 'cifar'"),
        (["--strategy", "magic"], "invalid choice: 'magic'"),
        (["--batch-size", "0"], "expected a whole number >= 1, got '0'"),
        (["--epochs", "nan"], "expected a number > 0, got 'nan'"),
        (["--noise-multiplier", "-1"], "expected a number >= 0, got '-1'"),
        (["--delta", "1"], "expected a number between 0 and 1, got '1'"),
        (["--seed", "-1"], "expected a whole number >= 0, got '-1'"),
        (["--device", "abacus"], "expected cpu, or cuda where there is such a device, got 'abacus'"),
    ],
)
def test_train_refuses_options_that_make_no_sense(options, message, capsys, monkeypatch):
    monkeypatch.delenv("PEGRAD_DATA", raising=False)
    assert message in refused(capsys, "train", *options)


@pytest.mark.parametrize("options", [["compare", "--model", "gpt"], ["compare", "--question", "why"], ["dance"], []])
def test_unknown_commands_and_choices_are_refused(options, capsys):
    assert "error" in refused(capsys, *options)


def test_a_missing_folder_is_one_line_and_status_1(tmp_path, capsys, monkeypatch):
    """Catches: a traceback; PEGRAD_DATA that wins over --data-dir."""
    monkeypatch.setenv("PEGRAD_DATA", str(tmp_path))
    assert str(tmp_path / "mnist") in failed(capsys, "train", "--data", "mnist")
    assert str(tmp_path / "here") in failed(capsys, "train", "--data", "mnist", "--data-dir", str(tmp_path / "here"))


def test_library_errors_are_one_line_and_status_1(tmp_path, capsys):
    assert "batch_size=2000" in failed(capsys, "train", "--batch-size", "2000")
    assert "image_size" in failed(capsys, "compare", "--image-size", "3")
    (tmp_path / "file").touch()
    assert "file" in failed(capsys, "train", "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("package", ["rich", "tqdm", "matplotlib", "sklearn"])
def test_a_missing_package_names_its_extra(package, capsys, monkeypatch):
    """Catches: packages of the extra that are imported with the library, and a bare ModuleNotFoundError."""
    for name in [name for name in sys.modules if name.startswith(("pegrad.cli.", "pegrad.papers.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert 'pip install "pegrad[train]"' in failed(capsys, "train", *TINY)


def test_a_bug_in_pegrad_is_not_taken_for_a_missing_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "pegrad.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "pegrad.cli.tables", None)
    with pytest.raises(ModuleNotFoundError, match="pegrad"):
        main(["compare"])


def test_compare_prints_strategies_and_kernels(capsys):
    """Catches: a strategy or a kernel without a line."""
    options = ("--model", "toy_cnn", "--image-size", "8", "--batch-size", "3", "--repeats", "1")
    assert main(["compare", *options, "--kernels"]) == 0
    out = capsys.readouterr().out
    assert "toy_cnn, 3×3×8×8: clipped" in out
    assert all(f"│ {name} " in out for name in (BASELINE, *STRATEGIES, *(f"grouped_conv, {k}" for k in KERNELS)))


def test_compare_can_be_narrowed(capsys):
    options = ("--model", "mnist_cnn", "--image-size", "8", "--batch-size", "2", "--repeats", "1")
    assert main(["compare", *options, "--strategies", "naive", "vmap", "--question", "norms"]) == 0
    out = capsys.readouterr().out
    assert "norms" in out
    assert "grouped_conv" not in out


def test_explain_prints_what_explain_prints(capsys):
    """Catches: lines folded at the terminal's width, another batch, a strategy that is not passed on."""
    options = ("--model", "toy_cnn", "--image-size", "8", "--batch-size", "3")
    network = build(parse(["explain", *options]))
    assert network.batch[0].shape == (3, 3, 8, 8)
    for strategy in ("auto", "ghost"):
        assert main(["explain", *options, "--strategy", strategy]) == 0
        title, _, table = capsys.readouterr().out.partition("\n")
        assert title == f"toy_cnn, 3×3×8×8: {strategy}"
        expected = str(pegrad.explain(network.loss, network.params, network.batch, strategy=strategy))
        assert table.strip() == expected.strip()


RUN = {"--num-examples": 1000, "--sampling-rate": 0.04, "--noise-multiplier": 0.8, "--steps": 10, "--delta": 1e-5}
ROWS = {
    "--noise-multiplier": "noise multiplier σ",
    "--steps": "steps",
    "--sampling-rate": "sampling rate q",
    "--delta": "δ",
}


def words(options: dict) -> list[str]:
    return [str(word) for option in options.items() for word in option]


def shown(capsys: pytest.CaptureFixture) -> dict[str, float]:
    """Read the table that was printed."""
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    return {name.strip(): float(number) for name, number in lines}


def cost(options: dict) -> float:
    sampler = pegrad.sampling.PoissonSampler(options["--num-examples"], options["--sampling-rate"])
    event = pegrad.accounting.dp_event(options["--noise-multiplier"], sampler, options["--steps"])
    return pegrad.accounting.epsilon(event, options["--delta"])


def test_epsilon_is_the_accountants(capsys):
    """Catches: q and σ in each other's places; an epsilon that is rounded down."""
    assert main(["epsilon", *words(RUN)]) == 0
    table = shown(capsys)
    assert cost(RUN) <= table["ε"] <= cost(RUN) * 1.0001
    assert table["ε by Rényi divergences alone"] > table["ε"]
    assert table["examples in a batch, on average"] == 40
    assert table["passes over the data set"] == 0.4
    others = RUN | {"--batch-size": 40, "--epochs": 0.4}
    del others["--sampling-rate"], others["--steps"]
    assert main(["epsilon", *words(others)]) == 0
    assert shown(capsys) == table


@pytest.mark.slow
@pytest.mark.parametrize("missing", ROWS)
def test_calibrate_finds_what_is_left_out(missing, capsys):
    """Catches: a number that overspends as it is shown, or leaves much of the budget."""
    budget = cost(RUN)
    assert main(["calibrate", "--epsilon", repr(budget), *words({k: v for k, v in RUN.items() if k != missing})]) == 0
    table = shown(capsys)
    found = table[ROWS[missing]]
    tolerance = 0.01 if missing == "--delta" else 1e-3
    assert found == pytest.approx(RUN[missing], rel=tolerance)
    spent = cost(RUN | {missing: int(found) if missing == "--steps" else found})
    assert 0.999 * budget < spent <= budget
    assert spent <= table["ε"] <= spent * 1.0001


@pytest.mark.parametrize(
    ("missing", "noise", "epsilon", "message"),
    [
        ("--steps", 1.5, 1e-3, "Not even one step"),
        ("--sampling-rate", 1.5, 1e-5, "Not even batches of one example"),
        ("--delta", 0.02, 1e-3, "No delta up to 0.5"),
        ("--steps", 1e5, 10, "More than 1048576 steps"),
    ],
)
def test_calibrate_says_where_nothing_fits(missing, noise, epsilon, message, capsys):
    others = {k: v for k, v in (RUN | {"--noise-multiplier": noise, "--steps": 100}).items() if k != missing}
    assert message in failed(capsys, "calibrate", "--epsilon", str(epsilon), *words(others))


def test_a_budget_for_the_whole_data_set_takes_it(capsys):
    """Catches: a search that must end between two numbers."""
    others = {k: v for k, v in RUN.items() if k != "--sampling-rate"}
    assert main(["calibrate", "--epsilon", "1000", *words(others)]) == 0
    assert shown(capsys)["sampling rate q"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["epsilon", *words(RUN), "--batch-size", "40"], "not allowed with argument"),
        (["epsilon", *words(RUN), "--epochs", "2"], "not allowed with argument"),
        (["epsilon", *words(RUN)[2:]], "required: --num-examples"),
        (["epsilon", *words(RUN), "--sampling-rate", "1.5"], "expected a number above 0, up to 1, got '1.5'"),
        (["calibrate", *words(RUN)], "required: --epsilon"),
        (["calibrate", "--epsilon", "1", *words(RUN)], "leave out one of"),
        (["calibrate", "--epsilon", "1", *words(RUN)[:6]], "got 2 of the four"),
        (
            ["calibrate", "--epsilon", "1", *words(RUN)[:2], *words(RUN)[4:6], *words(RUN)[8:], "--epochs", "2"],
            "--epochs: not allowed without",
        ),
        (["explain", "--strategy", "vmap"], "invalid choice: 'vmap'"),
        (["explain", "--model", "gpt"], "invalid choice: 'gpt'"),
    ],
)
def test_the_other_commands_refuse_options_that_make_no_sense(options, message, capsys):
    assert message in refused(capsys, *options)


def test_errors_of_the_accountant_are_one_line(capsys, monkeypatch):
    """Catches: a traceback where batches are larger than the data set, or dp-accounting is missing."""
    others = {k: v for k, v in RUN.items() if k != "--sampling-rate"}
    assert "num_examples=1000" in failed(capsys, "epsilon", *words(others), "--batch-size", "2000")
    assert "image_size" in failed(capsys, "explain", "--image-size", "3")
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    assert "pegrad[accounting]" in failed(capsys, "epsilon", *words(RUN | {"--delta": 1e-4}))


def test_mnist_shaped_files_train(tmp_path):
    """A data set in MNIST's format, made here: two batches of noise."""
    rng = np.random.default_rng(0)
    for part, size in (("train", 8), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (size, 28, 28)), rng.integers(0, 10, size)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = gzip.compress(header + array.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    options = ("--data", "mnist", "--data-dir", str(tmp_path), "--batch-size", "4", "--epochs", "1")
    report = train(tmp_path / "out", *options)
    assert report["settings"] == {"batch_size": 4, "epochs": 1, "lr": 0.001, "steps": 2}
    assert report["privacy"]["noise_multiplier"] == 1.1


@pytest.mark.skipif("PEGRAD_DATA" not in os.environ, reason="needs MNIST's files in $PEGRAD_DATA/mnist")
@pytest.mark.slow
def test_real_mnist_takes_a_few_steps(tmp_path):
    """Catches: real files that do not load, and a learning rate or noise that lets nothing be learnt."""
    report = train(tmp_path, "--data", "mnist", "--epochs", "0.04", "--batch-size", "64", "--seed", "0")
    assert report["settings"]["steps"] == 38
    assert report["history"][-1]["test_accuracy"] > 0.2
