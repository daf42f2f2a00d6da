"""What a graph must give: the call's own results, on the example and on other numbers, but for rounding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad.checking.compare import NUDGE, PERTURBED, nudged
from pegrad.compiling.backends import Backend
from pegrad.compiling.comparing import worst_difference
from pegrad.compiling.graphs import PLAIN, Compiler, Graph
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.programs import Call, Program, Trial
from pegrad.errors import CompileError
from pegrad.tracing.generators import Generators


class UnusualError(CompileError):
    """The arguments that a call was recorded with are not ones that its graph is good for."""


class Trials:
    """Inputs of a graph and what it must give.

    Args:
        program: what is compiled.
        call: the example.
        inputs: the program's, for the example.
        plain: its graph, run as it is.
        again: puts torch's generators back.

    Raises:
        UnusualError: no graph is good for the example.
        PegradError: as the call.
    """

    def __init__(self, program: Program, call: Call, inputs: Any, plain: Graph, again: Callable[[], None]) -> None:
        self._program, self._call, self._again = program, call, again
        with program.surroundings(call):
            if not plain(copies(inputs))[1]:
                raise UnusualError(
                    "The example is one that no graph is for: a gradient of it is not finite, or must be made again in "
                    "float64 to be exact. Compile for another"
                )
            other = self._moved(inputs, _other)
            trials = [*program.trials(call), *[other] * plain(copies(other.inputs))[1]]
        self._expected = [(trial.inputs, self._result(trial)) for trial in trials]

    def distance(self, graph: Graph) -> float:
        """Return how far what a graph gives is from what is expected, at its worst, over what passes for rounding."""
        return max(self._distance(graph, inputs, wanted) for inputs, wanted in self._expected)

    def distance_at(self, stage: int, backend: Backend, compiler: Compiler) -> float:
        """Return how far what a stage gives by a backend is from what it gives as it is, likewise.

        By itself: of a gradient that is nothing but rounding an optimizer makes a whole step, one way or the other. And
        a gradient may be another where numbers that are the same but for rounding are on the other side of a kink or a
        tie, as the greatest of a pooling window: it may be as far away as rounding the inputs takes it.
        """
        if stage == compiler.stages[-1]:
            found = self.distance(compiler.graph((*(PLAIN,) * stage, backend)))
            if found <= 1 or stage:
                return found
        return max(self._distance_at(stage, backend, compiler, inputs) for inputs, _ in self._expected)

    def _distance(self, graph: Graph, inputs: Any, wanted: Any) -> float:
        self._again()
        with self._program.surroundings(self._call):
            value, held = graph(copies(inputs) if self._program.handed_over else inputs)
        if not held:
            return inf
        given = self._program.compared(self._program.result(self._call, value))
        return worst_difference(given, wanted, self._program.start(inputs))

    def _distance_at(self, stage: int, backend: Backend, compiler: Compiler, inputs: Any) -> float:
        def outputs(by: Backend, inputs: Any) -> tuple[Any, ...]:
            self._again()
            with self._program.surroundings(self._call):
                return compiler.outputs(stage, by, inputs)

        wanted, given = outputs(PLAIN, inputs), outputs(backend, inputs)
        found = worst_difference(given, wanted)
        if found <= 1 or found == inf:
            return found
        others = (outputs(PLAIN, _nudged(inputs, seed)) for seed in range(PERTURBED))
        return worst_difference(given, wanted, others=others)

    def _result(self, trial: Trial) -> Any:
        self._again()
        return self._program.compared(trial.run())

    def _moved(self, inputs: Any, move: Callable[[Tensor], Tensor]) -> Trial:
        """Return a trial with other numbers."""
        structure, tensors = Pieces.of(inputs)
        other = structure.filled([move(t) for t in tensors])

        def run() -> Any:
            with self._program.surroundings(self._call), torch.no_grad():
                return self._program.result(self._call, self._program.graph(other))

        return Trial(other, run)


@contextmanager
def repeated() -> Iterator[Callable[[], None]]:
    """Inside the block, the function that it gives puts torch's generators back to where they were, as does its end."""
    start = Generators.now()
    try:
        yield start.restore
    finally:
        start.restore()


def copies(tree: Any) -> Any:
    """Copy every tensor of a pytree."""
    return trees.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _nudged(tree: Any, seed: int) -> Any:
    """Copy a pytree of tensors, every number changed by a few roundings."""
    generator = torch.Generator().manual_seed(seed)
    structure, tensors = Pieces.of(tree)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        return nudged(tensor, NUDGE * torch.finfo(tensor.dtype).eps, generator)

    return structure.filled([other(t) for t in tensors])


def _other(tensor: Tensor) -> Tensor:
    """Return a tensor of other numbers that are as good: a percent more here and less there, or in another order.

    What became a constant of a graph, and should not have, comes to light.
    """
    if tensor.is_floating_point():
        return tensor * (1 + _shares(tensor) / 64)
    return tensor.roll(1, 0) if tensor.dim() else tensor


def _shares(tensor: Tensor) -> Tensor:
    """Return numbers from -0.3 to 0.7, in the shape of a tensor."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return numbers.mul_(0.618).frac_().sub_(0.3).view(tensor.shape).to(tensor.dtype)
