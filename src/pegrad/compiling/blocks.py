"""Noise and update of a step, a block of a leaf's numbers at a time: what is made on the way stays in cache.

Optimizers work number by number, but each of their operations goes over a whole leaf, which is read from memory and
written to it again a dozen times; on a CPU that takes as long as the noise. All of them on one block, then all on the
next, give the same numbers.
"""

from itertools import pairwise
from operator import add, getitem
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pegrad.compiling.nodes import LOOK, STAGE, Look, written_by
from pegrad.compiling.order import before
from pegrad.random.aes import BLOCK
from pegrad.torch_internals import Operation, returns_view, unsafe_view

_FEW = 3  # operations that gain nothing


def by_blocks(graph: GraphModule) -> GraphModule:
    """Return a graph that gives the same, what comes after its first stage block by block, where that can be."""
    writer = _Writer(graph.graph)
    return GraphModule(writer.root, writer.graph) if writer.runs else graph


class _Writer:
    """Writes a graph anew, a module in place of each run of operations that go number by number over one leaf.

    What lies between those and needs none of their numbers comes in front of them.

    Attributes:
        graph: the new one.
        root: has its modules.
        runs: how many those are.
    """

    def __init__(self, old: Graph) -> None:
        self.graph = Graph()
        self.root = nn.Module()
        self.runs = 0
        self._copies: dict[Node, Node] = {}
        self._run: dict[Node, None] = {}
        waits_for = before([node for node in old.nodes if node.meta.get(STAGE)])
        for node in old.nodes:
            if _goes_number_by_number(node):
                if _count(node) != _count(next(iter(self._run), node)):
                    self._flush()
                self._run[node] = None
            else:
                if not self._run.keys().isdisjoint(waits_for.get(node, self._run)):
                    self._flush()
                self._copy(node)

    def _copy(self, node: Node) -> None:
        self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)

    def _flush(self) -> None:
        """Write the run."""
        run, self._run = self._run, {}
        outputs = [node for node in run if any(user not in run for user in node.users)]
        made = [_memory(node, run) for node in outputs]
        if len(run) <= _FEW or len({*made}) < len(made) or not run.keys() >= {*made}:  # others may write to the same
            for node in run:
                self._copy(node)
            return
        inputs = list(dict.fromkeys(i for node in run for i in node.all_input_nodes if i not in run))
        module = _Blocks(run, inputs, outputs)
        name = f"blocks_{self.runs}"
        self.runs += 1
        self.root.add_module(name, module)
        found = self.graph.call_module(name, tuple(self._copies[node] for node in inputs))
        for index, node in enumerate(outputs):
            self._copies[node] = self.graph.call_function(getitem, (found, index))


class _Blocks(nn.Module):
    """Runs operations on one block after the other.

    Args:
        run: the operations.
        inputs: what they are given from outside: tensors of as many numbers as each makes, or no dimension, or keys.
        outputs: those whose numbers are wanted.
    """

    def __init__(self, run: dict[Node, None], inputs: list[Node], outputs: list[Node]) -> None:
        super().__init__()
        self._shapes = [node.meta[LOOK].shape for node in outputs]
        self._count = _count(next(iter(run)))
        written = {_memory(argument, run) for node in run for argument in written_by(node)}
        self._written = [node in written for node in inputs]
        self._in_blocks = [_is_leaf(node, self._count) for node in inputs]
        starts = [cast(int, node.args[2]) for node in run if node.target is _NORMAL]
        first = -starts[0] % BLOCK if starts else 0  # or each block of noise were made twice
        self._bounds = sorted({0, *range(first, self._count, BLOCK), self._count})
        self._block = GraphModule(nn.Module(), _of_a_block(run, inputs, outputs))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Run: the outputs."""
        flat = [t.reshape(-1) if cut else t for t, cut in zip(inputs, self._in_blocks, strict=True)]
        outputs: list[Tensor] = []
        for begin, end in pairwise(self._bounds):
            parts = [t[begin:end] if cut else t for t, cut in zip(flat, self._in_blocks, strict=True)]
            made = self._block(begin, end, *parts)
            outputs = outputs or [part.new_empty(self._count) for part in made]
            for whole, part in zip(outputs, made, strict=True):
                whole[begin:end] = part
        for tensor, changed, written in zip(inputs, flat, self._written, strict=True):
            if written and not tensor.is_contiguous():
                tensor.copy_(changed.view_as(tensor))
        return [whole.view(shape) for whole, shape in zip(outputs, self._shapes, strict=True)]


def _of_a_block(run: dict[Node, None], inputs: list[Node], outputs: list[Node]) -> Graph:
    """Return a graph from the first number of a block, one after its last, and inputs to outputs."""
    graph = Graph()
    begin, end = graph.placeholder("begin"), graph.placeholder("end")
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in run:
        if node.target is _NORMAL:
            key, numel, start, _, *how = node.args
            part = [graph.call_function(add, (start, bound)) for bound in (begin, end)]
            copies[node] = graph.call_function(_NORMAL, (copies[cast(Node, key)], numel, *part, *how))
        elif node.target in _SHAPING:
            copies[node] = copies[cast(Node, node.args[0])]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return graph


def _goes_number_by_number(node: Node) -> bool:
    """Tell whether an operation makes each number of a large leaf of those at the same place, on a CPU."""
    target, look = node.target, node.meta.get(LOOK)
    if not node.meta.get(STAGE) or not isinstance(target, Operation) or not isinstance(look, Look):
        return False
    count = look.shape.numel()
    if count <= BLOCK or not look.contiguous or look.device != "cpu":
        return False
    if target is _NORMAL:
        return True
    if target not in _SHAPING | _COPYING and torch.Tag.pointwise not in target.tags:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or node.kwargs.get("memory_format") not in _PLAIN:
        return False
    looks = [source.meta.get(LOOK) for source in node.all_input_nodes]
    leaves = [look for look in looks if isinstance(look, Look) and look.shape]
    if target in _SHAPING:
        return leaves[0].shape.numel() == count
    return None not in looks and all(leaf.shape == look.shape for leaf in leaves)


def _is_leaf(node: Node, count: int) -> bool:
    look = node.meta.get(LOOK)
    return isinstance(look, Look) and look.shape.numel() == count


def _count(node: Node) -> int:
    return cast(Look, node.meta[LOOK]).shape.numel()


def _memory(node: Any, run: dict[Node, None]) -> Any:
    """Return the node whose value's memory is that of another's: as far as it is of the run."""
    while node in run and returns_view(node.target):
        node = node.args[0]
    return node


_ATEN = torch.ops.aten
_NORMAL = torch.ops.pegrad.aes_normal.default
_SHAPING = {_ATEN.view.default, _ATEN.detach.default, _ATEN.alias.default, unsafe_view.default}
_COPYING = {_ATEN.copy_.default, _ATEN.clone.default, _ATEN._to_copy.default}
_PLAIN = {None, torch.contiguous_format, torch.preserve_format}
