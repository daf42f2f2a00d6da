"""Noise and update of a step that works in place, a block of a leaf's numbers at a time.

Optimizers work number by number. So where the new numbers are written over the old ones, all operations can run on one
block before they run on the next: what they make on the way takes the memory of a block, not of several times the
largest leaf. Whether what the graph takes for granted holds is known before that, so nothing is made to be thrown away.
The numbers are the same.
"""

from itertools import pairwise
from operator import add
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pegrad import torch_internals
from pegrad.compiling.nodes import LOOK, STAGE, Look, written_by
from pegrad.compiling.order import before
from pegrad.random.aes import BLOCK
from pegrad.torch_internals import Operation, unsafe_view

_LARGE = 1 << 14  # a leaf of fewer numbers is not worth it


def by_blocks(graph: GraphModule) -> GraphModule:
    """Return a graph that gives the same, what writes over a leaf after the first stage done block by block.

    On a CPU: an accelerator takes as long over a few numbers as over many.
    """
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
        """Write the run: as it is, if it does more than to write over leaves."""
        run, self._run = [*self._run], {}
        renewals = [_Renewal.of(node) for node in run if any(_whole(given) not in run for given in written_by(node))]
        conditions = {renewal.condition for renewal in renewals if renewal}
        if any(user not in run for node in run for user in node.users) or None in renewals or len(conditions) != 1:
            for node in run:
                self._copy(node)
            return
        inputs = list(dict.fromkeys(i for node in run for i in node.all_input_nodes if i not in run))
        name = f"blocks_{self.runs}"
        self.runs += 1
        self.root.add_module(name, _Blocks(run, cast(list[_Renewal], renewals), inputs))
        self.graph.call_module(name, tuple(self._copies[node] for node in (*conditions, *inputs)))


class _Renewal(NamedTuple):
    """Numbers that are written over old ones where a condition holds."""

    condition: Node
    old: Node
    new: Node
    chosen: Node
    """Of the two, where the condition says which."""
    written: Node
    """The operation that writes it over the old ones."""

    @classmethod
    def of(cls, node: Node) -> "_Renewal | None":
        """Read an operation as one."""
        if node.target is not _ATEN.copy_.default:
            return None
        old, chosen = cast(tuple[Node, Node], node.args[:2])
        if chosen.target is not _ATEN.where.self:
            return None
        condition, new, other = cast(tuple[Node, Node, Node], chosen.args)
        return cls(condition, old, new, chosen, node) if other is old and not condition.meta[LOOK].shape else None


class _Blocks(nn.Module):
    """Runs operations on one block after the other.

    Args:
        run: the operations.
        renewals: what they do to old numbers.
        inputs: what they are given: tensors of as many numbers as each makes, some of which they write over; tensors of
            no dimension; keys.
    """

    def __init__(self, run: list[Node], renewals: list[_Renewal], inputs: list[Node]) -> None:
        super().__init__()
        count = _count(run[0])
        self._in_blocks = [_is_leaf(node, count) for node in inputs]
        self._renewed = [inputs.index(renewal.old) for renewal in renewals]
        starts = [cast(int, node.args[2]) for node in run if node.target is _NORMAL]
        first = -starts[0] % BLOCK if starts else 0  # or each block of noise were made twice
        self._bounds = sorted({0, *range(first, count, BLOCK), count})
        self._block = GraphModule(nn.Module(), _of_a_block(run, renewals, inputs))

    def forward(self, condition: Tensor, *inputs: Tensor) -> None:
        """Run, if a condition holds."""
        if not condition:
            return
        flat = [t.reshape(-1) if cut else t for t, cut in zip(inputs, self._in_blocks, strict=True)]
        for begin, end in pairwise(self._bounds):
            parts = [t[begin:end] if cut else t for t, cut in zip(flat, self._in_blocks, strict=True)]
            self._block(begin, end, *parts)
        for index in self._renewed:
            if not inputs[index].is_contiguous():
                inputs[index].copy_(flat[index].view_as(inputs[index]))


def _of_a_block(run: list[Node], renewals: list[_Renewal], inputs: list[Node]) -> Graph:
    """Return a graph that takes the first number of a block, one after its last, and inputs."""
    graph = Graph()
    begin, end = graph.placeholder("begin"), graph.placeholder("end")
    copies = {node: graph.placeholder(node.name) for node in inputs}
    chosen = {renewal.chosen: renewal.new for renewal in renewals}
    in_place = {renewal.new: operation for renewal in renewals if (operation := _in_place(renewal, run))}
    done = {renewal.written for renewal in renewals if renewal.new in in_place}
    for node in run:
        if node.target is _NORMAL:
            key, numel, start, _, *how = node.args
            part = [graph.call_function(add, (start, bound)) for bound in (begin, end)]
            copies[node] = graph.call_function(_NORMAL, (copies[cast(Node, key)], numel, *part, *how))
        elif node in chosen:
            copies[node] = copies[chosen[node]]
        elif node.target in _SHAPING:
            copies[node] = copies[cast(Node, node.args[0])]
        elif node not in done:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = in_place.get(node, node.target)
    graph.output(())
    return graph


def _in_place(renewal: _Renewal, run: list[Node]) -> Any:
    """Return the operation that makes new numbers where the old ones are, unless those are needed yet."""
    new, old = renewal.new, renewal.old
    if new not in run or not isinstance(new.target, Operation) or new.args[:1] != (old,):
        return None
    for node in run[run.index(new) + 1 :]:
        if old in map(_whole, node.all_input_nodes) and node not in (renewal.chosen, renewal.written):
            return None
    return torch_internals.in_place(new.target)


def _goes_number_by_number(node: Node) -> bool:
    """Tell whether an operation makes each number of a large leaf of those at the same place, on a CPU."""
    target, look = node.target, node.meta.get(LOOK)
    if not node.meta.get(STAGE) or not isinstance(target, Operation) or not isinstance(look, Look):
        return False
    if look.shape.numel() < _LARGE or look.device != "cpu":
        return False
    if target is _NORMAL:
        return True
    if target not in _SHAPING | _COPYING and torch.Tag.pointwise not in target.tags:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or node.kwargs.get("memory_format") not in _PLAIN:
        return False
    looks = [source.meta.get(LOOK) for source in node.all_input_nodes]
    if target in _SHAPING:
        return all(isinstance(given, Look) and given.shape.numel() == look.shape.numel() for given in looks)
    return all(isinstance(given, Look) and given.shape in ((), look.shape) for given in looks)


def _whole(argument: Any) -> Any:
    """Return that whose memory an argument is."""
    while isinstance(argument, Node) and argument.target in _SHAPING:
        argument = argument.args[0]
    return argument


def _is_leaf(node: Node, count: int) -> bool:
    look = node.meta.get(LOOK)
    return isinstance(look, Look) and look.shape.numel() == count


def _count(node: Node) -> int:
    return cast(Look, node.meta[LOOK]).shape.numel()


_ATEN = torch.ops.aten
_NORMAL = torch.ops.pegrad.aes_normal.default
_SHAPING = {_ATEN.view.default, _ATEN.detach.default, _ATEN.alias.default, unsafe_view.default}
_COPYING = {_ATEN.copy_.default, _ATEN.clone.default}
_PLAIN = {None, torch.contiguous_format, torch.preserve_format}
