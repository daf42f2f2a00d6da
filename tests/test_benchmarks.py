"""The benchmarks' runner keeps what it measured, their networks are ours, and the smallest experiment runs through."""

import importlib
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pegrad
from pegrad.papers import models

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Import a file of benchmarks/, which is a program and no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def runner(module) -> ModuleType:
    return module("runner")


class Counted:
    """A point that counts how often it is measured."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> dict[str, Any]:
        self.calls += 1
        return {"value": self.value}


def test_finished_points_are_not_measured_again(runner, tmp_path) -> None:
    """Catches: a runner that measures all points anew, or forgets those of an earlier run."""
    path = tmp_path / "deep" / "results.json"
    points = {"a": Counted(1.0), "b": Counted(2.0)}
    runner.run(points, runner.Results(path, {"rounds": 3}, "cpu"))
    more = points | {"c": Counted(3.0)}
    results = runner.Results(path, {"rounds": 3}, "cpu")
    runner.run(more, results)
    assert [point.calls for point in more.values()] == [1, 1, 1]
    assert [results[key]["value"] for key in more] == [1.0, 2.0, 3.0]
    assert list(json.loads(path.read_text())["points"]) == ["a", "b", "c"]


def test_a_stopped_run_keeps_what_it_finished(runner, tmp_path) -> None:
    """Catches: results that are written at the end only."""

    def stopped() -> dict[str, Any]:
        raise KeyboardInterrupt

    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        runner.run({"a": Counted(1.0), "b": stopped, "c": Counted(3.0)}, runner.Results(path, {}, "cpu"))
    results = runner.Results(path, {}, "cpu")
    assert "a" in results
    assert "b" not in results
    assert "c" not in results


def test_results_say_where_and_with_what_they_were_measured(runner, tmp_path) -> None:
    """Catches: a field that a reader of a number would miss."""
    path = tmp_path / "results.json"
    runner.run({"a": Counted(1.0)}, runner.Results(path, {"rounds": 3}, "cpu"))
    found = json.loads(path.read_text())
    assert found["settings"] == {"rounds": 3}
    assert found["device"] == "cpu"
    assert {"processor", "cpu_count", "threads", "memory_gb", "tf32", "accelerator", "python", "torch"} <= set(
        found["machine"]
    )
    assert {"pegrad", "opacus", "backpack-for-pytorch", "jax", "jax-privacy"} <= set(found["versions"])
    assert {"value", "date", "commit", "dirty"} == set(found["points"]["a"])


def test_points_of_other_settings_are_refused(runner, tmp_path) -> None:
    """Catches: numbers of two kinds in one file."""
    path = tmp_path / "results.json"
    runner.run({"a": Counted(1.0)}, runner.Results(path, {"rounds": 3}, "cpu"))
    with pytest.raises(SystemExit, match="other settings"):
        runner.Results(path, {"rounds": 4}, "cpu")
    assert "a" not in runner.Results(path, {"rounds": 4}, "cpu", fresh=True)


def test_ratios_are_reported_by_median_and_quartiles(runner) -> None:
    """Catches: a mean, and quartiles the wrong way round."""
    assert runner.spread([9.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_every_network_has_an_equal_module(module) -> None:
    """Catches: a module whose layers, or the order of whose parameters, are not those of `pegrad.papers.models`."""
    native, workloads = module("native"), module("workloads")
    # One of each family; at 224x224 and with 138 million parameters, the smallest image will do.
    chosen = {
        name: workloads.TABLE[name] for name in ("small_cnn", "vgg11", "resnet18", "wrn16_4", "vit", "alexnet_224")
    } | {"resnet50": workloads.resnet(50, 2)}
    small = workloads.Workload(partial(models.vgg_imagenet, 11, image_size=32), partial(native.vgg_imagenet, 11), 2)
    for name, workload in (chosen | {"vgg11_imagenet": small}).items():
        task = replace(workload, batch_size=2).task("cpu")
        images, labels = task.batch
        twin = task.module()
        with torch.no_grad():
            ours = torch.func.vmap(task.loss, (None, 0))(task.params, task.batch)
            torch.testing.assert_close(ours, F.cross_entropy(twin(images), labels, reduction="none"), msg=name)
        leaves = native.declared(task.params)
        assert all(own.data_ptr() == leaf.data_ptr() for own, leaf in zip(twin.parameters(), leaves, strict=True))


def test_peak_memory_is_that_of_the_call(module) -> None:
    """Catches: a high-water mark from before the call, and one read after the memory was freed."""
    peak = module("isolation").peak
    megabytes = 1 << 20
    torch.ones(200 * megabytes, dtype=torch.uint8)  # a higher mark, which must not count
    held = torch.ones(50 * megabytes, dtype=torch.uint8)
    value, needed = peak(lambda: torch.ones(100 * megabytes, dtype=torch.uint8)[-1].item(), "cpu")
    assert value == held[0].item() == 1
    assert 95 * megabytes < needed < 115 * megabytes


def test_peak_memory_has_nothing_of_gaps_among_small_blocks(module) -> None:
    """Catches: a large block in a gap that small ones left, which stays when it is freed."""
    isolation = module("isolation")
    megabytes = 1 << 20
    isolation.large_blocks_apart()
    small = [torch.ones(100_000, dtype=torch.uint8) for _ in range(1000)]
    del small[200:800]

    def one_after_the_other() -> int:
        torch.ones(30 * megabytes, dtype=torch.uint8)
        return torch.ones(64 * megabytes, dtype=torch.uint8)[-1].item()

    assert isolation.peak(one_after_the_other, "cpu")[1] < 75 * megabytes


@pytest.mark.parametrize(
    ("function", "argument", "limit", "phrase"),
    [
        (int, "x", 60, "ValueError: invalid literal"),
        (torch.empty, 1 << 50, 60, "out of memory"),
        (importlib.import_module, "no_such_peer", 60, "no_such_peer is not installed"),
        (os._exit, 1, 60, "process died"),
        (time.sleep, 60, 2, "longer than 2 s"),
    ],
)
def test_what_fails_in_its_own_process_is_a_phrase_in_ours(module, function, argument, limit, phrase) -> None:
    """Catches: a contestant whose failure stops the whole run, or is shown as a traceback."""
    isolation = module("isolation")
    with pytest.raises(isolation.FailedError, match=phrase):
        isolation.in_own_process(function, argument, limit=limit)


@pytest.mark.slow
def test_clipped_grad_runs_through_and_resumes(module, tmp_path, capsys) -> None:
    """Catches: a strategy that is not right, a failure that is not shown, a second run that measures again."""
    arguments = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    arguments += ["--contestants", "auto", "ghost", "--optimizers", "adam"]
    module("clipped_grad").main(arguments)
    path = tmp_path / "clipped_grad_smoke_cpu.json"
    found = json.loads(path.read_text())["points"]
    names = ["non-private", "auto", "ghost"]
    assert list(found) == [
        *(f"gradient/tiny/{name}" for name in names),
        "step/tiny/adam",
        *(f"memory/tiny/{name}" for name in names),
    ]
    for name in names[1:]:
        point = found[f"gradient/tiny/{name}"]
        assert point["difference"] < 1e-12
        assert point["difference_as_timed"] < 1e-3
        assert found[f"memory/tiny/{name}"]["peak_bytes"] > 0
        assert point["ratio"]["low"] <= point["ratio"]["median"] <= point["ratio"]["high"]
        assert point["warnings"] == []
    assert {"non-private step", "private step", "noise", "private update"} <= set(found["step/tiny/adam"]["parts"])
    assert (tmp_path / "clipped_grad_smoke_cpu.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*names, "private step"])

    module("clipped_grad").main(arguments)
    assert json.loads(path.read_text())["points"] == found
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_table_1_takes_the_points_that_are_there(module, tmp_path) -> None:
    """Catches: points that are measured twice, or overwritten."""
    arguments = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    module("clipped_grad").main([*arguments, "--contestants", "auto", "--optimizers"])
    path = tmp_path / "clipped_grad_smoke_cpu.json"
    found = json.loads(path.read_text())["points"]
    module("table1").main(arguments)
    points = json.loads(path.read_text())["points"]
    assert {key: points[key] for key in found} == found
    assert {key.split("/")[-1] for key in points} == {"non-private", "auto", "ghost", "naive", "vmap", "grouped_conv"}
    assert (tmp_path / "table1_smoke_cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_clipping_is_measured_and_right(module, tmp_path) -> None:
    """Catches: a clipping compared with another's answer, or with its own."""
    arguments = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    module("clipping").main(arguments)
    points = json.loads((tmp_path / "clipping_smoke_cpu.json").read_text())["points"]
    clippings = module("contestants").CLIPPINGS
    for name, contestant in clippings.items():
        assert contestant.reference != name
        if contestant.family == "ours":
            assert points[f"gradient/tiny/{name}"]["difference"] < 1e-12
            assert points[f"memory/tiny/{name}"]["peak_bytes"] > 0
    assert points["step/tiny/adaptive"]["ratio"]["median"] > 0
    assert (tmp_path / "clipping_smoke_cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_modules_are_measured_in_a_file_of_their_own(module, tmp_path, monkeypatch) -> None:
    """Catches: rows of modules that overwrite those of the papers' networks."""
    small = module("workloads").shapes_of(dim=8, layers=1, vocabulary=11, length=4, image=32, batch=2)
    monkeypatch.setitem(module("workloads").SCALES, "smoke", {"rnn": small["rnn"]})
    arguments = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path), "--only", "rnn"]
    module("modules").main(arguments)
    points = json.loads((tmp_path / "modules_smoke_cpu.json").read_text())["points"]
    assert points["gradient/rnn/ghost"]["difference"] < 1e-12
    assert {key.split("/")[2] for key in points} == set(module("modules").CONTESTANTS)


def test_a_contestant_that_fails_stays_in_the_table(module, tmp_path, capsys) -> None:
    """Catches: a peer that is dropped in silence."""
    arguments = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path), "--limit", "0.01"]
    module("clipped_grad").main([*arguments, "--contestants", "auto", "--optimizers", "sgd"])
    assert capsys.readouterr().out.count("longer than 0.01 s") == 3


@pytest.mark.parametrize(
    "experiment",
    [
        *("quick", "gradcheck", "operations", "overhead", "noise"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("nanobatch", "mnist", "accuracy", "distributed", "compiled")
        ),
    ],
)
def test_small_experiments_run_through_and_resume(module, experiment, tmp_path, capsys) -> None:
    """Catches: an experiment that has no longer what it measures, or measures again what it has."""
    arguments = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    module(experiment).main(arguments)
    found = (tmp_path / f"{experiment}_smoke_cpu.json").read_text()
    shown = capsys.readouterr().out
    module(experiment).main(arguments)
    assert (tmp_path / f"{experiment}_smoke_cpu.json").read_text() == found
    assert capsys.readouterr().out == shown
    assert json.loads(found)["points"]


def test_a_streamed_batch_is_the_whole_batch(module) -> None:
    """Catches: ways of one name that compute other sums, examples left out or drawn twice, a stream of other sizes."""
    nanobatch = module("nanobatch")
    task = module("workloads").SCALES["smoke"]["tiny"].task("cpu")
    assert [len(labels) for _, labels in nanobatch.stream(task, 10, 4)] == [4, 4, 2]
    whole, *others = (pegrad.trees.leaves(way(task, 10, 4)) for way in nanobatch.WAYS.values())
    for other in others:
        torch.testing.assert_close(other, whole)


def test_copies_of_an_image_are_shifts_of_it(module) -> None:
    """Catches: a first copy that is moved, a shift that is too long or never taken, rows and columns exchanged."""
    accuracy = module("accuracy")
    images = torch.randn(40, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    copies = accuracy.shifted(pegrad.random.key(0), images, 9, 2, -1.0)
    assert copies.shape == (40, 9, 2, 6, 5)
    assert torch.equal(copies[:, 0], images)
    padded, seen = F.pad(images, (2, 2, 2, 2), value=-1.0), set()
    for image, own in zip(padded, copies[:, 1:], strict=True):
        for copy in own:
            found = [(y, x) for y in range(5) for x in range(5) if torch.equal(copy, image[:, y : y + 6, x : x + 5])]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 25


def test_copies_of_an_image_are_one_example(module) -> None:
    """Catches: a sum over the copies, which makes K equal images K times as long a gradient."""
    accuracy = module("accuracy")
    model = models.mnist_cnn(image_size=8)
    params, image = model.init(pegrad.random.key(0)), torch.rand(1, 1, 1, 8, 8)
    norm = pegrad.per_example_norm(accuracy.mean_cross_entropy(model))
    one, four = (norm(params, (image.expand(1, k, 1, 8, 8), torch.tensor([3]))) for k in (1, 4))
    torch.testing.assert_close(one, four)


def test_gradcheck_finds_the_strategies_equal(module, tmp_path) -> None:
    """Catches: a strategy whose mean gradient is another."""
    module("gradcheck").main(["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    point = json.loads((tmp_path / "gradcheck_smoke_cpu.json").read_text())["points"]["gradcheck"]
    assert set(point["differences"]) == {"vmap", "grouped_conv", "ghost", "book_keeping", "auto"}
    assert all(found["float64"] < 1e-12 and found["float32"] < 1e-4 for found in point["differences"].values())


@pytest.mark.slow
def test_figures_are_drawn(module, tmp_path) -> None:
    """Catches: a panel without points, or a picture that is not written."""
    module("figures").main(
        ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path), "--only", "figure1", "figure2"]
    )
    points = json.loads((tmp_path / "figure1_smoke_cpu.json").read_text())["points"]
    assert {key.split("/")[0] for key in points} == {"2 layers", "3 layers", "4 layers"}
    assert all(seconds > 0 for point in points.values() for seconds in point["seconds"].values())
    assert (tmp_path / "figure1_smoke_cpu.png").stat().st_size > 10_000
    assert (tmp_path / "figure2_smoke_cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_mixed_ghost_finds_the_kernels_and_the_largest_batches(module, tmp_path) -> None:
    """Catches: a choice that is not what its name says, a wrong clipped sum, a batch that does not fit."""
    experiment = module("mixed_ghost")
    experiment.main(["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    points = json.loads((tmp_path / "mixed_ghost_smoke_cpu.json").read_text())["points"]
    for name in ("ghost only", "instantiate only", "mixed, published rule", "ghost", "book_keeping"):
        assert points[f"time/tiny/{name}"]["difference"] < 1e-12
        found = points[f"batch/tiny/{name}"]
        assert found["tried"][str(found["largest"])] <= experiment.MEMORY["smoke"]
    for layer in points["choice/tiny"]["layers"]:
        assert layer["times"][layer["fastest"]] == min(layer["times"].values())
        assert (layer["rule"] == "gram") == (2 * layer["positions"] ** 2 < layer["numbers"])
    assert (tmp_path / "mixed_ghost_smoke_cpu.png").stat().st_size > 10_000
    assert (tmp_path / "mixed_ghost_smoke_cpu_choice.png").stat().st_size > 10_000


@pytest.mark.parametrize("largest", [1, 7, 100, 5000])
def test_the_largest_batch_is_found(module, largest) -> None:
    """Catches: a search that stops short, runs past the memory by far, or asks for one batch for ever."""
    experiment = module("mixed_ghost")

    def peak(size: int) -> int:
        return 50_000 + max(20_000, 1000 * size)

    memory, tried = peak(max(largest, 21)), {32: peak(32)}
    while (size := experiment.next_batch(tried, memory)) is not None:
        assert size not in tried
        tried[size] = peak(size)
    assert len(tried) <= 8
    assert max(tried) <= 4 * max(largest, 32)
    assert 0.98 * memory <= max(found for found in tried.values() if found <= memory)


def test_choices_are_what_their_names_say(module) -> None:
    """Catches: `ghost only` that stacks, `instantiate only` that does not, a published rule the wrong way round."""
    choices = module("choices")
    loss, params, batch, _ = module("workloads").vgg(11, 2).task("cpu")
    for strategy, stacks in ((choices.GhostOnly(), {False}), (choices.InstantiateOnly(), {True})):
        uses = pegrad.explain(loss, params, batch, strategy=strategy).uses
        chosen = [c for use in uses for c in use.candidates if c.norm == use.norm and len(use.candidates) > 2]
        assert {candidate.stacks for candidate in chosen} == stacks
    uses = pegrad.explain(loss, params, batch, strategy=choices.PublishedRule()).uses
    convolutions = [use for use in uses if use.operation.startswith("conv") and len(use.candidates) > 2]
    assert not convolutions[0].norm.startswith("gram")  # T = 1024, D p = 27 * 64
    assert convolutions[-1].norm.startswith("gram")  # T = 4, D p = 4608 * 512


def test_scattering_moves_and_turns_with_the_image(module) -> None:
    """Catches: wavelets off their centre, orientations out of order, an image that leaks around the border."""
    scattering = module("scattering").scattering
    image = torch.zeros(1, 29, 29, dtype=torch.float64)
    image[0, 9:16, 11:18] = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = scattering(image)
    assert found.shape == (1, 81, 8, 8)
    moved = scattering(image.roll((4, -4), (1, 2)))
    torch.testing.assert_close(moved[..., 2:7, 1:6], found[..., 1:6, 2:7], rtol=0, atol=1e-3 * found.max().item())

    turned = scattering(image.rot90(1, (1, 2))).rot90(-1, (-2, -1))
    first, second = found[:, 1:17].reshape(1, 2, 8, 8, 8), found[:, 17:].reshape(1, 8, 8, 8, 8)
    by_quarter = torch.cat(
        [found[:, :1], first.roll(-4, 2).flatten(1, 2), second.roll((-4, -4), (1, 2)).flatten(1, 2)], 1
    )
    torch.testing.assert_close(turned, by_quarter, rtol=0, atol=1e-9)
    assert scattering(torch.ones(1, 29, 29))[0, 1:, 4, 4].abs().max() < 1e-3  # no detail in the middle of a plain image


def test_every_shape_is_right_and_has_its_native_gradient(module) -> None:
    """Catches: a row whose module is not what the loss computes, a frozen or tied weight lost, a wrong clipped sum."""
    contestants, workloads = module("contestants"), module("workloads")
    native, everyone = module("native"), contestants.EVERYONE
    small = workloads.shapes_of(dim=64, layers=1, vocabulary=20, length=4, image=32, batch=4)
    assert list(small) == list(workloads.SHAPES)
    for name, workload in small.items():
        task = workload.task("cpu").first(2).to(torch.float64)
        gradient = contestants.native_gradient(task, 1.0)()
        summed = contestants.by_strategy(task, 1e9, "naive")()
        for found, expected in zip(native.declared(gradient), native.declared(summed), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=name)
        ours, loop = everyone["auto"].make(task, 0.1)(), everyone["naive"].make(task, 0.1)()
        for found, expected in zip(native.declared(ours), native.declared(loop), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=name)
