"""Measure the kernels that a loss's gradients could be found by, and choose by that instead of by estimates."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pegrad._validate import check_size
from pegrad.call import Call
from pegrad.compiling.backends import Backend
from pegrad.compiling.graphs import Compiler
from pegrad.compiling.recording import record
from pegrad.errors import CompileError
from pegrad.per_example import Loss
from pegrad.plan.candidates import Shaped, timing_key
from pegrad.plan.plan import Plan
from pegrad.problem import Problem
from pegrad.rules.site import Kernel
from pegrad.strategies import Strategy, resolve_traced
from pegrad.strategies.failures import attributed
from pegrad.strategies.paths import by_path
from pegrad.strategies.traced import Traced
from pegrad.tracing.eager import eager
from pegrad.trees import PyTree


@eager
def autotune(
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    *,
    strategy: str | Strategy = "auto",
    repeats: int = 3,
    backend: str | None = None,
) -> Strategy:
    """Measure every kernel at every site of a loss, and return a strategy that chooses by what was measured.

    Args:
        loss: as for `pegrad.per_example_grad`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors with one leading axis `B`: of the size that will be used, for shapes that were not
            measured are estimated. Kernels run on random numbers of the same shapes.
        strategy: `auto`, `book_keeping` or `ghost`, or one of those classes' objects.
        repeats: runs of each kernel, >= 1, of which the fastest counts.
        backend: one of `torch.compile`'s, such as `inductor`, if `pegrad.compile` is to compile by it: each kernel is
            compiled before it is measured, which takes seconds for each; what cannot be compiled is measured as it is.
            None: none is.

    Returns:
        A strategy to be passed on as `strategy=`.

    Raises:
        ArgumentError: the strategy does not choose site by site, `repeats` is below 1, or there is no such backend.
        LeafError, LossError: as `pegrad.per_example_grad`.

    Example:
        >>> import torch, pegrad
        >>> params, batch = torch.zeros(3), torch.ones(8, 5, 3)
        >>> tuned = pegrad.autotune(lambda p, x: (x @ p).sum(), params, batch, strategy="ghost")
        >>> pegrad.per_example_norm(lambda p, x: (x @ p).sum(), strategy=tuned)(params, batch).shape
        torch.Size([8])
    """
    chosen = resolve_traced(strategy)
    check_size("repeats", repeats)
    timings: dict[str, float] = {}
    for use in _uses(chosen, Call.of(loss, params, batch, None).problem):
        site, shapes = use.site, (use.x, use.g)
        native = site.summing(*shapes)
        kernels = {**site.stacking(*shapes), **site.norming(*shapes)}
        if (len(kernels) == 1 and not native) or not use.dtype.is_floating_point:
            continue
        kernels |= {"native": native} if native else {}
        pair = [torch.randn(shape, device=site.source.device, dtype=site.source.dtype) for shape in shapes]
        for name, kernel in kernels.items():
            key = timing_key(site, *shapes, name)
            if key not in timings:
                run = _compiled(kernel, pair, backend) if backend else partial(kernel.run, *pair)
                timings[key] = min(_clock(run, pair[0].device) for _ in range(repeats))
    return replace(chosen, timings=timings)


def _uses(chosen: Traced, problem: Problem) -> Iterator[Shaped]:
    """Yield the uses that are chosen for, those of one kind taken for one."""
    with attributed(chosen, problem):
        traces = [path.answer for path in by_path(problem, chosen.trace)]
        groups = [(g, t) for t in traces for g in Plan(t, chosen.choose, problem.sum_rows).groups]
    for group, trace in groups:
        if group.sites:
            yield from group.shaped(len(trace.losses))


def _compiled(kernel: Kernel, pair: list[torch.Tensor], backend: str) -> Callable[[], Any]:
    """Compile a kernel's run on an input and the gradient at an output, as it would be compiled within a graph."""
    recording = record(lambda pair: kernel.run(*pair), pair)
    try:
        graph = Compiler(recording, pair).graph((Backend(backend),))
        graph(pair)  # once, as some backends compile only then
    except CompileError:
        return partial(kernel.run, *pair)
    return partial(graph, pair)


def _clock(run: Callable[[], Any], device: torch.device) -> float:
    """Time one run, in nanoseconds."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e9
