"""A call as a graph: every operation that it runs, plain ones of PyTorch's, from tensors to tensors.

What runs is noted below autograd and `vmap`, where there are only tensors in memory and operations on them: forward
pass, backward pass and our own arithmetic alike. Tensors that the call did not make of its arguments (a mask that the
loss closes over, frozen weights) become inputs of the graph as well, the very tensors.
"""

from collections.abc import Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from operator import getitem
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from pegrad import trees
from pegrad.assumptions import Assumptions, assuming
from pegrad.compiling.nodes import KIN, LOOK, MEMORY, STAGE, Look
from pegrad.compiling.order import leaf_by_leaf
from pegrad.compiling.pieces import Pieces
from pegrad.compiling.reuse import reuse
from pegrad.errors import CompileError, PegradError
from pegrad.torch_internals import TorchDispatchMode, import_compiler, unsafe_view


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded call."""

    graph: GraphModule
    """From the tensors of the call's inputs, and `captured`, to those of its value, and last a boolean scalar: whether
    what was assumed of the inputs holds."""
    captured: list[Tensor]
    """What the call used beside its inputs."""
    value: Pieces
    """All of the value but the tensors."""

    @property
    def operations(self) -> int:
        """How many there are in the graph."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)


Handed = Callable[[Any], Sequence[Tensor]]
"""From a pytree to those of its tensors whose memory is handed over, or take it over."""


def record(function: Callable[[Any], Any], inputs: Any, handed_over: tuple[Handed, Handed] | None = None) -> Recording:
    """Call a function, and note every operation.

    Args:
        function: a pure function from a pytree to a pytree.
        inputs: its argument. What is no tensor among the leaves is taken as it is.
        handed_over: of the inputs, tensors whose memory the graph takes for those of the value, each of the same shape
            and dtype as the one before it. They stay as they are where what was assumed does not hold.

    Raises:
        CompileError: what the function does depends on numbers in a way that no graph can follow.
        PegradError: as the function.
    """
    import_compiler()  # or a backward pass imports it halfway, and `eager` starts the call anew
    structure, tensors = Pieces.of(inputs)
    plain = [t.detach().as_subclass(Tensor) for t in tensors]
    assumptions = Assumptions()
    recorder = _Recorder(plain, assumptions)
    before = _RECORDER.set(recorder)
    try:
        with torch.no_grad(), assuming(assumptions), recorder:
            given = structure.filled(plain)
            value = function(given)
            held = assumptions.held(plain[0].device)
            rest, outputs = Pieces.of(value)
            if handed_over:
                old, new = (of(tree) for of, tree in zip(handed_over, (given, value), strict=True))
                taken = {id(b): a.copy_(torch.where(held, b, a)) for a, b in zip(old, new, strict=True)}
                outputs = [taken.get(id(output), output) for output in outputs]
    except PegradError:
        raise
    except Exception as error:
        raise recorder.refused or CompileError(
            f"The call cannot be recorded: it ended with a {type(error).__name__} (above)"
        ) from error
    finally:
        _RECORDER.reset(before)
    if recorder.refused:  # and swallowed by the loss
        raise recorder.refused
    return Recording(recorder.finished([*outputs, held]), [t.detach() for t in recorder.captured], rest)


def next_stage(kin: Sequence[Tensor]) -> None:
    """Let a new stage of the graph begin, if a call is being recorded: see `pegrad.compiling.stages`.

    Args:
        kin: tensors from the stage before, all of one kind, so that what is next to nothing among them is to be judged
            by the others.
    """
    if recorder := _RECORDER.get():
        recorder.next_stage(kin)


class _Recorder(TorchDispatchMode):
    """Notes operations.

    Args:
        inputs: the first inputs of the graph.
        assumptions: says when to pause.

    Attributes:
        captured: the other inputs.
        refused: why the call cannot be recorded, if it cannot.
    """

    def __init__(self, inputs: list[Tensor], assumptions: Assumptions) -> None:
        super().__init__()
        self.captured: list[Tensor] = []
        self.refused: CompileError | None = None
        self._stage = 0
        self._versions: list[int] = []
        self._assumptions = assumptions
        self._graph = Graph()
        self._nodes: MutableMapping[Tensor, Node] = WeakTensorKeyDictionary()
        for index, tensor in enumerate(inputs):
            self._nodes[tensor] = self._last = self._graph.placeholder(f"input_{index}")
            self._last.meta.update({LOOK: Look.of(tensor), MEMORY: self._last})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of every operation."""
        kwargs = kwargs or {}
        if self._assumptions.paused:
            return func(*args, **kwargs)
        leaves, spec = trees.flatten((args, kwargs))
        nodes = [self._nodes.get(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        if any(nodes):
            if torch.Tag.data_dependent_output in func.tags:
                self._refuse(f"numbers are asked for (if, float(), .item(), torch.equal: {func})")
            if _shaped_by_numbers(func, args):
                self._refuse(f"the shape of what {func} returns depends on numbers")
        elif torch.Tag.data_dependent_output in func.tags:
            return func(*args, **kwargs)
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            self._refuse(f"{func} draws from a generator of its own")
        if func is _ATEN.lift_fresh.default:  # a new tensor of numbers that Python knows
            result = func(*args)
            self._note(result, self._call(_ATEN.clone.default, (self._enter(result.clone()),)))
            return result
        given = [
            (node or self._enter(leaf)) if isinstance(leaf, Tensor) else leaf
            for leaf, node in zip(leaves, nodes, strict=True)
        ]
        result = func(*args, **kwargs)
        if func in _VIEWS and _same(result, args[0]):
            self._nodes[result] = given[0]
        else:
            self._note(
                result, self._call(func, *trees.unflatten(spec, given)), [t for t in leaves if isinstance(t, Tensor)]
            )
        return result

    def next_stage(self, kin: Sequence[Tensor]) -> None:
        """See the function of that name."""
        self._stage += 1
        for tensor in kin:
            self._nodes[tensor].meta[KIN] = True

    def finished(self, outputs: list[Tensor]) -> GraphModule:
        """Return the graph.

        Raises:
            CompileError: the call has written to a tensor that it did not make.
        """
        self._graph.output([self._nodes.get(t) or self._enter(t) for t in outputs])
        if self._versions != [tensor._version for tensor in self.captured]:
            raise CompileError(
                "The call cannot be recorded: it changes a tensor in place that is none of its arguments, so it is not "
                "a pure function"
            )
        self._graph.eliminate_dead_code()
        reuse(self._graph, stage=0)
        leaf_by_leaf(self._graph, self._stage)
        return GraphModule(torch.nn.Module(), self._graph)

    def _note(self, result: Any, node: Node, given: Sequence[Tensor] = ()) -> None:
        """Note what an operation returned; if that is one of the tensors it was given, it is noted already."""
        if isinstance(result, Tensor):
            for one in (node, self._nodes.setdefault(result, node)):  # which `squeeze_` may have given another shape
                one.meta[LOOK] = Look.of(result)
            where = result.untyped_storage().data_ptr()
            shared = (self._nodes[t] for t in given if t.untyped_storage().data_ptr() == where)
            node.meta[MEMORY] = next((other.meta[MEMORY] for other in shared), node)
        elif isinstance(result, tuple | list):
            for index, one in enumerate(result):
                if isinstance(one, Tensor):
                    self._note(one, self._call(getitem, (node, index)), given)

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        node = self._graph.call_function(function, args, kwargs)
        node.meta[STAGE] = self._stage
        return node

    def _enter(self, tensor: Tensor) -> Node:
        """Make a tensor an input of the graph."""
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(f"captured_{len(self.captured)}")
        self.captured.append(tensor)
        self._versions.append(tensor._version)
        self._nodes[tensor] = self._last
        self._last.meta.update({LOOK: Look.of(tensor), MEMORY: self._last})
        return self._last

    def _refuse(self, why: str) -> NoReturn:
        self.refused = self.refused or CompileError(
            f"The call cannot be recorded for other numbers than those of the example: {why}. Write it with "
            "torch.where, or leave it to eager PyTorch"
        )
        raise self.refused


def _same(view: Tensor, of: Tensor) -> bool:
    """Tell whether a view is all of a tensor, as it lies in memory."""
    return view.shape == of.shape and view.stride() == of.stride() and view.storage_offset() == of.storage_offset()


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)
_ATEN = torch.ops.aten
_VIEWS = {
    *(_ATEN.detach.default, _ATEN.alias.default, _ATEN.view.default, unsafe_view.default),
    *(_ATEN.slice.Tensor, _ATEN.expand.default, _ATEN.permute.default, _ATEN.transpose.int),
}


def _shaped_by_numbers(func: Any, args: Any) -> bool:
    if func is _ATEN.index.Tensor:  # which is, by a mask
        return any(index is not None and index.dtype in _MASKS for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


_MASKS = (torch.bool, torch.uint8)
