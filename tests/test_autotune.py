"""`autotune`: what is measured is what will run, and compiled where that will be."""

import time
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.registry import _BACKENDS, _COMPILER_FNS

import oracle
import pegrad

BMM = torch.ops.aten.bmm.default


def loss(params, x):
    return (x @ params).tanh().square().sum()


@pytest.fixture
def args():
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 7, 6, dtype=torch.float64)


@pytest.fixture
def backends(monkeypatch):
    """Compilers by name, known to `torch.compile` during a test."""

    def known(name, compile_graph):
        monkeypatch.setitem(_COMPILER_FNS, name, compile_graph)
        monkeypatch.setitem(_BACKENDS, name, None)
        return name

    return known


def slow(graph, tensors):
    """Compile a graph to one that takes long if it has a batched product in it."""
    takes = 0.2 if any(node.target is BMM for node in graph.graph.nodes) else 0.0

    def run(*tensors):
        time.sleep(takes)
        return graph(*tensors)

    return run


def test_kernels_are_measured_as_the_backend_makes_them(args, backends):
    """Catches: a backend that is asked for and not used."""
    plain = pegrad.autotune(loss, *args)
    tuned = pegrad.autotune(loss, *args, backend=backends("slow", slow))
    assert {*plain.timings} == {*tuned.timings}
    batched = {name for name in tuned.timings if tuned.timings[name] > 0.2e9}
    assert batched
    assert all(not name.endswith("native") for name in batched)
    assert {name for name in plain.timings if plain.timings[name] > 0.2e9} == set()


def test_compiling_is_not_measured(args, backends):
    """Catches: that of a backend which compiles when a graph first runs."""

    def lazy(graph, tensors):
        waits = [0.2]

        def run(*tensors):
            time.sleep(waits.pop() if waits else 0.0)
            return graph(*tensors)

        return run

    tuned = pegrad.autotune(loss, *args, backend=backends("lazy", lazy), repeats=1)
    assert max(tuned.timings.values()) < 0.2e9


def test_what_it_returns_chooses_by_that(args):
    tuned = pegrad.autotune(loss, *args, backend="aot_eager", repeats=1)
    out = pegrad.clipped_grad(loss, clip_norm=0.1, strategy=tuned)(*args)
    oracle.assert_close(out.grads, oracle.clipped_sum(oracle.per_example_grads(loss, *args), 0.1))
    for favourite in {name.split()[-1] for name in tuned.timings} - {"native"}:
        rigged = {key: 1.0 if key.endswith((favourite, "native")) else 1e12 for key in tuned.timings}
        (use,) = pegrad.explain(loss, *args, strategy=replace(tuned, timings=rigged)).uses
        assert use.norm == favourite


def test_what_a_backend_cannot_compile_is_measured_as_it_is(args, backends):
    def fails(graph, tensors):
        raise RuntimeError("no")

    tuned = pegrad.autotune(loss, *args, backend=backends("fails", fails), repeats=1)
    assert {*tuned.timings} == {*pegrad.autotune(loss, *args, repeats=1).timings}


def test_an_unknown_backend_is_refused(args):
    with pytest.raises(pegrad.ArgumentError, match="'no such'"):
        pegrad.autotune(loss, *args, backend="no such")
