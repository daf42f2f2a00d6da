"""What a user calls: `compile`, and what it returns."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from pegrad.compiling.backends import Backend
from pegrad.compiling.function import CompileReport, make, run
from pegrad.compiling.graphs import Backends, Graph
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.programs import Call, Function, Program
from pegrad.compiling.step import StepProgram
from pegrad.compiling.trials import UnusualError
from pegrad.dp_sgd import DPSGD
from pegrad.errors import ArgumentError, CompileError
from pegrad.tracing.eager import outermost
from pegrad.tracing.generators import Generators


def compile(
    function: Callable[..., Any],
    *example_args: Any,
    backend: str | None = None,
    new_shapes: Literal["compile", "refuse"] = "compile",
    donate: bool = False,
) -> "Compiled":
    """Make a graph of a per-example function or a private step, and kernels of the graph.

    The graph is one of plain operations of PyTorch's: forward and backward pass, norms, weights and sum, and of a step
    the noise and the update as well. It is good for the shapes, dtypes and devices that it was made for. Where Python
    would decide by numbers, the graph takes something for granted: that every gradient is finite, and exact without
    being made again in float64; that `if x.mean() > 0` in the loss is answered as it was for the example. It works out
    beside the value whether that is so, and where it is not, the call is made again, eagerly: a hostile example is as
    harmless as ever.

    Each graph is compared with the call when it is made, leaf by leaf: on the example, and on other numbers of the same
    shapes, which brings to light what has become a constant and should not have. A private step is compared without
    its noise as well. What differs by more than rounding is not used: Inductor is tried once more without its pattern
    matcher, and a backend that was asked for is refused.

    What the loss reads beside its arguments is read once, when the graph is made: tensors that it closes over are part
    of the graph as they are (changed in place, they are seen; replaced by others, they are not), and so are a module's
    `training` and every number. Warnings and prints are not repeated. `dp_sgd`'s step takes its keys, its number, the
    learning rate and the ledger from its arguments at each call; an optimizer that is not of `pegrad.optim` and counts
    in Python makes its update outside of the graph.

    Args:
        function: `clipped_grad`, `per_example_grad`, `per_example_norm`, a statistic, or any pure function of pytrees
            made of them; or the step of `dp_sgd`.
        example_args: arguments to compile for at once. None: the first call does it.
        backend: a compiler of `torch.compile`'s: `inductor`, which needs a C++ compiler on a CPU, `aot_eager`,
            `cudagraphs`, ...; or `eager`, which runs the graph as it is: the same bits as the call, without the Python
            around it. Of a step, `inductor, eager` is one for the clipped gradient and another for noise and update.
            What a report says is understood. None: `eager` and `inductor` are measured on the arguments, for a step
            on each part by itself, then the faster graph and no graph at all, and the fastest is taken.
        new_shapes: whether arguments of other shapes, dtypes, devices or values that are no tensors get a graph of
            their own, `compile`, or a `CompileError`, `refuse`.
        donate: of a step, take the memory of the old parameters and of the optimizer's old state for the new ones. The
            old ones must not be used again, nor share memory with each other.

    Returns:
        A function of the same signature. Its results are constants to any further differentiation.

    Raises:
        ArgumentError: the function is none, there is no such backend, or `donate` is for what is no step.
        CompileError: the call cannot be recorded, or the backend that was asked for fails or gives something else.
        PegradError: as the function, for the example.

    Guarantee: what a compiled step or clipped gradient returns is what the function returns, up to the rounding of the
    backend's arithmetic, for all arguments; keys and the number of a step are never part of a graph. Bound to
    `test_what_a_graph_takes_for_granted_is_looked_at` and `test_a_graph_holds_no_key`.

    >>> import torch, pegrad
    >>> clipped = pegrad.clipped_grad(lambda params, x: (params @ x).tanh(), clip_norm=1.0)
    >>> compiled = pegrad.compile(clipped, torch.ones(2), torch.eye(2), backend="eager")
    >>> compiled(torch.ones(2), torch.eye(2)).norms
    tensor([0.4200, 0.4200])
    >>> compiled.sensitivity
    1.0
    """
    if new_shapes not in ("compile", "refuse"):
        raise ArgumentError(f"Expected new_shapes to be 'compile' or 'refuse', got {new_shapes!r}")
    if not callable(function):
        raise ArgumentError(f"Expected a function to compile, got {type(function).__name__}")
    if donate and not isinstance(function, DPSGD):
        raise ArgumentError("Expected donate=True for a step of dp_sgd alone: nothing else has arguments made anew")
    program = StepProgram(function, donate=donate) if isinstance(function, DPSGD) else Function(function)
    compiled = Compiled(function, program, _backends(backend) if backend else None, new_shapes == "compile")
    if example_args:
        compiled.prepare(*example_args)
    return compiled


class Compiled:
    """A function as graphs, one for each kind of arguments. Made by `compile`.

    Attributes:
        function: what was compiled.
        reports: how, for each kind of arguments so far.
        misses: how many calls were made again eagerly, because something that their graph takes for granted did not
            hold.
    """

    def __init__(self, function: Callable[..., Any], program: Program, by: Backends | None, retrace: bool) -> None:
        self.function = function
        self.reports: list[CompileReport] = []
        self.misses = 0
        self._program = program
        self._backends = by
        self._retrace = retrace
        self._graphs: dict[Any, Graph | None] = {}
        self._unusual: dict[Any, int] = {}

    def __getattr__(self, name: str) -> Any:
        """Return what else the function has: its `sensitivity`, or `init`."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.function, name)

    @outermost
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Returns:
            What it returns, up to rounding.

        Raises:
            CompileError: arguments of another kind, where those are refused or cannot be compiled.
            PegradError: as the function.
        """
        call = Call(args, kwargs)
        inputs = self._program.inputs(call)
        self._check_memory(inputs)
        start = Generators.now()
        try:
            graph = self._graph(call, inputs, again=False)
            if graph is None:
                return self._program.eagerly(call)
            result, held = run(self._program, call, inputs, graph)
            if held:
                return result
        except UnusualError:
            pass
        self.misses += 1
        start.restore()
        return self._program.eagerly(call)

    @outermost
    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Compile for arguments, if that is not yet done.

        Raises:
            CompileError, PegradError: as a call.
        """
        call = Call(args, kwargs)
        self._graph(call, self._program.inputs(call))

    def _check_memory(self, inputs: Any) -> None:
        """Refuse memory that would be taken twice."""
        if self._program.handed_over:
            places = [tensor.untyped_storage().data_ptr() for tensor in self._program.handed_over[0](inputs)]
            if len({*places}) < len(places):
                raise ArgumentError(
                    "Expected parameters and optimizer state that lie apart in memory, but some of their leaves share "
                    "memory, which donate=True would overwrite twice: clone them, or compile without it"
                )

    def _graph(self, call: Call, inputs: Any, *, again: bool = True) -> Graph | None:
        """Return the graph for arguments of a kind; None: calls are made eagerly.

        Args:
            call: the arguments.
            inputs: the program's.
            again: whether it is tried to make one though others of the kind were not good for that; otherwise less
                and less often, as recording takes as long as many calls.

        Raises:
            UnusualError: there is none yet.
        """
        kind = _kind(inputs)
        if kind not in self._graphs:
            if self._graphs and not self._retrace:
                raise CompileError(
                    "Expected arguments of the shapes, dtypes, devices and values that the function was compiled for, "
                    "got others: pad the batch and mask it, or compile with new_shapes='compile'"
                )
            unusual = self._unusual.get(kind, 0)
            self._unusual[kind] = unusual + 1
            if not again and unusual & (unusual - 1):  # no power of two
                raise UnusualError("It was tried often enough with others of the kind")
            self._graphs[kind], report = make(self._program, call, self._backends)
            self.reports.append(report)
        return self._graphs[kind]


def _backends(names: str) -> Backends:
    """Read names as reports have them."""
    parts = [name.strip().split(" without ") for name in names.split(",")]
    return tuple(Backend(name, tuple(without)) for name, *without in parts)


def _kind(inputs: Any) -> Any:
    """Return all that a graph depends on but numbers: of its inputs, and of what surrounds the call."""
    structure, tensors = Pieces.of(inputs)
    device = tensors[0].device.type if tensors else "cpu"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    looks = tuple((t.shape, t.dtype, t.device) for t in tensors)
    kind = structure, looks, autocast, torch.get_default_dtype()
    try:
        hash(kind)
    except TypeError:
        raise ArgumentError(
            "Expected each argument of a compiled function to be a pytree of tensors and of values that can be hashed"
        ) from None
    return kind
