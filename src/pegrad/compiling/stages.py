"""A recorded graph in stages, one after the other, each by a compiler of its own.

What one compiler makes faster of a step's gradient, it may make slower of the noise and the update; and it may take
very long over one of them alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pegrad.compiling.backends import Backend, Runs
from pegrad.compiling.nodes import LOOK, MEMORY, STAGE, written_by
from pegrad.torch_internals import Operation, returns_view


class Stage(NamedTuple):
    """A part of a graph, as a graph."""

    graph: GraphModule
    inputs: list[Node]
    """Of the whole: the nodes whose values it takes."""
    outputs: list[Node]
    """Of the whole: those of its own that others take."""

    def run(self, part: Runs, values: dict[Node, Tensor]) -> None:
        """Run, compiled to a function, on the values of nodes of the whole, and add its own."""
        values.update(zip(self.outputs, part(*[values[node] for node in self.inputs]), strict=True))

    @property
    def written_parts(self) -> int:
        """How often it writes to a part of a tensor."""
        written = [argument for node in self.graph.graph.nodes for argument in written_by(node)]
        return sum(_is_part(argument) for argument in written)


class Staged:
    """A graph in stages.

    Args:
        graph: the whole, each node but inputs and output marked with its `STAGE`.
        tensors: what it is compiled for. They may be overwritten.

    Attributes:
        stages: in their order.
    """

    def __init__(self, graph: GraphModule, tensors: Sequence[Tensor]) -> None:
        self.stages = list(_cut(graph.graph))
        self._inputs = graph.graph.find_nodes(op="placeholder")
        self._outputs = cast(list[Node], graph.graph.output_node().args[0])
        self._examples: list[list[Tensor]] = []
        self._compiled: dict[tuple[int, Backend], Runs] = {}
        values = dict(zip(self._inputs, tensors, strict=True))
        for stage in self.stages:
            self._examples.append([values[node] for node in stage.inputs])
            stage.run(stage.graph, values)

    def compiled(self, backends: Sequence[Backend]) -> Runs:
        """Compile each stage by its backend. None is compiled twice by the same.

        Raises:
            CompileError: one fails.
        """
        parts = [self._part(number, backend) for number, backend in enumerate(backends)]
        inputs, outputs, stages = self._inputs, self._outputs, self.stages  # not the examples

        def run(*tensors: Tensor) -> list[Tensor]:
            values = dict(zip(inputs, tensors, strict=True))
            for stage, part in zip(stages, parts, strict=True):
                stage.run(part, values)
            return [values[node] for node in outputs]

        return run

    def alone(self, number: int, backend: Backend) -> Callable[[], Any]:
        """Return a stage by a backend, on what it was compiled for, which it may overwrite."""
        return partial(self._part(number, backend), *self._examples[number])

    def outputs(self, number: int, backend: Backend, tensors: Sequence[Tensor]) -> dict[Node, Tensor]:
        """Run up to a stage, that by a backend, those before it as they are: what it gives, by node of the whole."""
        values = dict(zip(self._inputs, tensors, strict=True))
        for stage in self.stages[:number]:
            stage.run(stage.graph, values)
        self.stages[number].run(self._part(number, backend), values)
        return {node: values[node] for node in self.stages[number].outputs}

    def _part(self, number: int, backend: Backend) -> Runs:
        if (number, backend) not in self._compiled:
            self._compiled[number, backend] = backend(self.stages[number].graph, self._examples[number])
        return self._compiled[number, backend]


def _cut(graph: Graph) -> Iterator[Stage]:
    """Cut a graph into its stages."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for number in sorted({node.meta[STAGE] for node in nodes}):
        own = {node: None for node in nodes if node.meta[STAGE] == number}
        inputs = list(dict.fromkeys(i for node in own for i in node.all_input_nodes if i not in own))
        outputs = [node for node in own if any(user not in own for user in node.users)]
        part = Graph()
        copies = {node: part.placeholder(node.name) for node in inputs}
        for node, copy in copies.items():
            copy.meta.update({key: node.meta[key] for key in (LOOK, MEMORY)})
        for node in own:
            copies[node] = part.node_copy(node, copies.__getitem__)
        part.output([copies[node] for node in outputs])
        yield Stage(GraphModule(torch.nn.Module(), part), inputs, outputs)


def _is_part(argument: Any) -> bool:
    """Tell whether an argument is a view of another tensor."""
    if not isinstance(argument, Node):
        return False
    if argument.target is getitem:
        return _is_part(argument.args[0])
    return isinstance(argument.target, Operation) and returns_view(argument.target)
