"""Timing in turns, ratios by round, and the table's rows."""

from functools import partial

import pytest
import torch

from pegrad.errors import ArgumentError
from pegrad.papers import comparison
from pegrad.papers.comparison import BASELINE, QUESTIONS, compare, interleaved, machine, ratios, relative_difference
from pegrad.strategies import STRATEGIES, Strategy, Vmap


def loss(params, example):
    x, y = example
    return (torch.tanh(params["w"] @ x).sum() - y) ** 2


PARAMS = {"w": torch.linspace(-1, 1, 6).reshape(2, 3)}
BATCH = (torch.linspace(-2, 2, 12).reshape(4, 3), torch.arange(4.0))


def test_functions_take_turns_after_one_call_each():
    """Catches: all rounds of one function before the next, no call to warm up, or one that is counted."""
    calls: list[str] = []
    functions = {name: partial(calls.append, name) for name in "abc"}
    times = interleaved(functions, repeats=3)
    assert "".join(calls) == "abc" * 4
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(second > 0 for taken in times.values() for second in taken)


def test_a_cuda_device_is_waited_for_before_and_after_each_call(monkeypatch):
    """Catches: a clock that stops when the kernels are queued, or starts while older ones still run."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    interleaved({"f": partial(log.append, "call")}, repeats=1, device="cuda")
    assert log == ["call", "wait", "call", "wait"]
    log.clear()
    interleaved({"f": partial(log.append, "call")}, repeats=1, device="cpu")
    assert log == ["call", "call"]


def test_ratios_are_medians_over_rounds_not_ratios_of_medians():
    """Catches: median(a) / median(b), here 1.25, and the mean of the ratios, here 2.75."""
    times = {"base": [1.0, 4.0, 10.0], "other": [2.0, 5.0, 50.0]}
    assert ratios(times, "base") == {"base": 1.0, "other": 2.0}


def test_relative_difference_is_the_worst_leaf_relative_to_itself():
    """Catches: a difference relative to the largest leaf, and one that keeps the last leaf only."""
    reference = {"large": torch.tensor([1000.0]), "small": torch.tensor([0.5, 1.0]), "zero": torch.zeros(2)}
    assert relative_difference(reference, reference) == 0
    other = {**reference, "small": torch.tensor([0.5, 1.25])}
    assert relative_difference(other, reference) == 0.25


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_strategy_is_a_row_and_agrees_with_vmap(question):
    """Catches: a strategy left out, rows out of order, a question that compares other things."""
    baseline, *rows = compare(loss, PARAMS, BATCH, question=question, repeats=1)
    assert (baseline.name, baseline.ratio, baseline.difference) == (BASELINE, 1.0, None)
    assert [row.name for row in rows] == [*STRATEGIES]
    assert all(row.seconds > 0 and row.ratio > 0 and row.difference < 1e-5 for row in rows)


class _Wrong(Vmap):
    def stacked(self, problem):
        grads, values = super().stacked(problem)
        return [1.5 * grad for grad in grads], values


def test_a_wrong_strategy_shows(monkeypatch):
    """Catches: a difference that is taken from the strategy's own answer, or not from vmap's."""
    strategies: dict[str, Strategy] = {"wrong": _Wrong()}
    _, row = compare(loss, PARAMS, BATCH, strategies, question="stacked", repeats=1)
    assert row.difference == pytest.approx(0.5)


def test_errors_name_the_argument():
    with pytest.raises(ArgumentError, match=r"question.*'stacked', 'norms', 'clipped'.*'speed'"):
        compare(loss, PARAMS, BATCH, question="speed")
    with pytest.raises(ArgumentError, match="repeats=0"):
        interleaved({}, repeats=0)


def test_the_machine_is_described():
    host = machine()
    assert host["torch"] == torch.__version__
    assert host["processor"]
    assert host["threads"] == torch.get_num_threads()


def test_a_processor_without_its_file_has_a_name(monkeypatch, tmp_path):
    """Catches: an error where /proc is missing, as on macOS."""
    monkeypatch.setattr(comparison, "Path", lambda name: tmp_path / "missing")
    assert machine()["processor"]
