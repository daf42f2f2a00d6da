"""What a user calls: `compile`, and what it returns."""

from collections.abc import Callable
from typing import Any

import torch

from pegrad.compiling.backends import Backend
from pegrad.compiling.function import Graph, Report, make, run
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.programs import Call, Function, Program
from pegrad.compiling.step import StepProgram
from pegrad.dp_sgd import DPSGD
from pegrad.errors import ArgumentError, CompileError
from pegrad.tracing.eager import outermost
from pegrad.tracing.generators import Generators


class Compiled:
    """A function as graphs, one for each kind of arguments. Made by `compile`.

    Attributes:
        function: what was compiled.
        reports: how, for each kind of arguments that it was called with.
        misses: how many calls were made again eagerly, because what their graph takes for granted did not hold: that
            no gradient needs float64 to be exact, say, or that the loss answers its own questions as it did.
    """

    def __init__(self, function: Any, program: Program, backend: Backend | None, retrace: bool) -> None:
        self.function = function
        self.reports: list[Report] = []
        self.misses = 0
        self._program = program
        self._backend = backend
        self._retrace = retrace
        self._graphs: dict[Any, Graph | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Returns:
            What it returns, up to rounding; constants to any further differentiation.

        Raises:
            CompileError: arguments of another kind, where those are refused or cannot be compiled.
            PegradError: as the function.
        """
        return self._called(Call(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        """Return what else the function has: its sensitivity, say, or `init`."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.function, name)

    @outermost
    def _called(self, call: Call) -> Any:
        graph = self._graph(call)
        if graph is None:
            return self._program.eagerly(call)
        start = Generators.now()
        result, held = run(self._program, call, graph)
        if held:
            return result
        self.misses += 1
        start.restore()
        return self._program.eagerly(call)

    def _graph(self, call: Call) -> Graph | None:
        structure, tensors = Pieces.of(self._program.inputs(call))
        looks = tuple((t.shape, t.dtype, t.device) for t in tensors)
        device = tensors[0].device.type if tensors else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = structure, looks, autocast, torch.get_default_dtype()
        try:
            return self._graphs[kind]
        except KeyError:
            pass
        if self._graphs and not self._retrace:
            raise CompileError(
                "Expected arguments of the shapes, dtypes, devices and other values that the function was compiled "
                "for, got others: pad the batch, or compile with new_shapes='compile'"
            )
        self._graphs[kind], report = make(self._program, call, self._backend)
        self.reports.append(report)
        return self._graphs[kind]


def compile(
    function: Callable[..., Any], *example_args: Any, backend: str | None = None, new_shapes: str = "compile"
) -> Compiled:
    """Make a graph of a function of this package, and kernels of the graph.
    """
    if new_shapes not in ("compile", "refuse"):
        raise ArgumentError(f"Expected new_shapes to be 'compile' or 'refuse', got {new_shapes!r}")
    if not callable(function):
        raise ArgumentError(f"Expected a function to compile, got {type(function).__name__}")
    program = StepProgram(function) if isinstance(function, DPSGD) else Function(function)
    compiled = Compiled(function, program, Backend(backend) if backend else None, new_shapes == "compile")
    if example_args:
        compiled._graph(Call(example_args, {}))
    return compiled
