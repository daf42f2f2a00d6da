"""A private step as a graph: clip, noise and update. What Python knows better is worked out around it, at every call.

Outside of the graph are the keys of the noise (one for each leaf, derived anew for every step), the seed of the loss's
own random numbers, the step's number and what optimizers make of it, adaptive bounds, the sensitivity and the ledger.
All of them come in as tensors or are put to what comes out, so no graph ever holds a key or the number of a step.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pegrad import random, trees
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.programs import Call, Trial
from pegrad.compiling.stand_ins import AdaptiveInGraph, InGraph
from pegrad.compiling.update import Numbers, counting, given, with_counts, without_counts
from pegrad.dp_sgd import DPSGD, Metrics, State, Step
from pegrad.trees import PyTree


class _Inputs(NamedTuple):
    """What the graph is a function of."""

    params: PyTree
    optimizer: PyTree  # its state, without integers; None: the update is made outside
    numbers: list[Tensor]  # that the optimizer makes of those
    batch: PyTree
    mask: Tensor | None
    keys: Tensor  # (leaves, 32), of the noise
    sensitivity: Tensor  # float64 scalar
    bounds: Tensor | None  # (G,), float64, where clipping is adaptive


class _Value(NamedTuple):
    """What the graph returns."""

    params: PyTree  # or the noisy gradients, where the update is made outside
    optimizer: PyTree
    metrics: Metrics
    counts: Any  # (G,), noisy, where clipping is adaptive


class StepProgram:
    """A private step.

    Args:
        step: the step.
        donate: whether the memory of old parameters and of the optimizer's old state is taken for the new ones.
    """

    def __init__(self, step: DPSGD, *, donate: bool = False) -> None:
        self.step = step
        self.handed_over = (_kept, _kept) if donate else None
        self._numbers: dict[Any, Numbers | None] = {}

    def eagerly(self, call: Call) -> Step:
        """See `Program.eagerly`."""
        return self.step(*call.args, **call.kwargs)

    def inputs(self, call: Call) -> _Inputs:
        """See `Program.inputs`."""
        params, state, batch, mask = _arguments(*call.args, **call.kwargs)
        optimizer, counts = without_counts(state.optimizer)
        kind = Pieces.of((params, optimizer))[0]
        if kind not in self._numbers:
            self._numbers[kind] = Numbers.of(self.step, params, state)
        numbers = self._numbers[kind]
        bounds = torch.tensor(state.bounds, dtype=torch.float64) if self.step.adaptive else None
        noisy = params if bounds is None else (params, bounds)  # with the counts, one for each bound
        keys = random.leaf_keys(random.fold_in(state.key, state.step), noisy)
        sensitivity = torch.tensor(self.step.clipped_at(state).sensitivity, dtype=torch.float64)
        if numbers is None:
            return _Inputs(params, None, [], batch, mask, keys, sensitivity, bounds)
        return _Inputs(params, optimizer, numbers.now(counts), batch, mask, keys, sensitivity, bounds)

    def graph(self, inputs: _Inputs) -> _Value:
        """See `Program.graph`."""
        bounds: Any = () if inputs.bounds is None else inputs.bounds.unbind()
        none = State(random.key(0), 0, None, bounds)
        among = InGraph(inputs.keys, inputs.sensitivity, len(trees.leaves(inputs.params)))
        step = replace(self.step, adaptive=self.step.adaptive and AdaptiveInGraph.of(self.step.adaptive))
        released = step.release_among(among, inputs.params, none, [(0, (inputs.batch, inputs.mask))])
        counts = None if inputs.bounds is None else released.state.bounds
        if inputs.optimizer is None:
            return _Value(released.grads, None, released.metrics, counts)
        state = none._replace(optimizer=counting(inputs.optimizer, given(inputs.numbers)))
        params, state = self.step.updated(inputs.params, [released.grads], state)
        return _Value(params, state.optimizer, released.metrics, counts)

    def result(self, call: Call, value: _Value) -> Step:
        """See `Program.result`."""
        params, state, _, _ = _arguments(*call.args, **call.kwargs)
        after = self.step.after(state)
        if self.step.adaptive:
            moved = self.step.adaptive.following(state.bounds, value.counts, self.step.clipped_grad.normalize_by)
            after = after._replace(bounds=moved)
        if value.optimizer is None:
            return Step(*self.step.updated(params, [value.params], after), value.metrics)
        optimizer = with_counts(value.optimizer, without_counts(state.optimizer)[1])
        return Step(value.params, after._replace(optimizer=optimizer), value.metrics)

    def surroundings(self, call: Call) -> AbstractContextManager[Any]:
        """See `Program.surroundings`."""
        params, state, batch, _ = _arguments(*call.args, **call.kwargs)
        return random.torch_generators(self.step.loss_key(state, 0), (params, batch))

    def compared(self, result: Step) -> tuple[Any, ...]:
        """See `Program.compared`."""
        metrics, bounds = result.metrics, torch.tensor(result.state.bounds)
        values = metrics.losses, metrics.norms, metrics.aux, metrics.non_finite
        return result.params, result.state.optimizer, *values, bounds

    def start(self, inputs: _Inputs) -> tuple[Any, ...]:
        """See `Program.start`: new parameters differ from the old ones by little."""
        return inputs.params, None, None, None, None, None, None

    def trials(self, call: Call) -> Iterator[Trial]:
        """See `Program.trials`: once without noise, behind which much could hide, and once with it."""
        silent = replace(self.step, noise_multiplier=0.0, gradient_noise_multiplier=0.0)
        inputs = self.inputs(call)
        none = inputs._replace(sensitivity=torch.zeros_like(inputs.sensitivity))
        yield Trial(none, lambda: silent(*call.args, **call.kwargs))
        yield Trial(inputs, lambda: self.eagerly(call))


def _kept(tree: _Inputs | _Value) -> list[Tensor]:
    """Return what a step makes new of its like; not the gradients of which an update is made outside."""
    return [] if tree.optimizer is None else Pieces.of((tree.params, tree.optimizer))[1]


def _arguments(
    params: PyTree, state: State, batch: PyTree, mask: Tensor | None = None
) -> tuple[PyTree, State, PyTree, Tensor | None]:
    return params, state, batch, mask
