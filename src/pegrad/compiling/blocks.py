"""Noise and update of a step that works in place, a block of a leaf's numbers at a time.

Optimizers work number by number. So where the new numbers are written over the old ones, all operations can run on one
block before they run on the next: what they make on the way takes the memory of a block, not of several times the
largest leaf. Whether what the graph takes for granted holds is known before that, so nothing is made to be thrown away.
The numbers are the same. A compiler can make one kernel of all that is done to a block, `pegrad.compiling.pairs`, and
one function of what there is beside the blocks.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pegrad import torch_internals
from pegrad.compiling.nodes import LOOK, STAGE, Look, written_by
from pegrad.compiling.order import before
from pegrad.compiling.pairs import Compile, Kernels, Pairs
from pegrad.random.aes import BLOCK as AES_BLOCK
from pegrad.torch_internals import Operation, unsafe_view

BLOCK = AES_BLOCK
"""Numbers of a leaf that are made at a time."""

_LARGE = 1 << 14  # a leaf of fewer numbers is not worth it
_FEW = 1 << 8  # operations beside the blocks: more take a compiler long, and are little of steps that are long


def by_blocks(graph: GraphModule) -> GraphModule:
    """Return a graph that gives the same, what writes over a leaf after the first stage done block by block.

    On a CPU: an accelerator takes as long over a few numbers as over many.

    Args:
        graph: a recorded one, or a stage of it.
    """
    writer = _Writer(graph.graph, None)
    return GraphModule(writer.root, writer.graph) if writer.runs else graph


def compiled_by_blocks(graph: GraphModule, tensors: Sequence[Tensor], compile: Compile) -> Callable[..., Any]:
    """Compile a graph: kernels of a block where there are blocks, and what little is beside them in one piece.

    Args:
        graph: see `by_blocks`.
        tensors: what it is compiled for.
        compile: how.
    """
    writer = _Writer(graph.graph, compile)
    if not writer.runs:
        return compile(graph, tensors)
    return writer.compiled_beside(tensors, compile) or GraphModule(writer.root, writer.graph)


class _Writer:
    """Writes a graph anew, a module in place of each run of operations that go number by number over one leaf.

    What lies between those and needs none of their numbers comes in front of them.

    Attributes:
        graph: the new one.
        root: has its modules.
        runs: how many those are.
    """

    def __init__(self, old: Graph, compile: Compile | None) -> None:
        self._compile = compile
        self._kernels: Kernels = {}
        self.graph = Graph()
        self.root = nn.Module()
        self.runs = 0
        self._copies: dict[Node, Node] = {}
        self._run: dict[Node, None] = {}
        self._done: set[Node] = set()  # in blocks
        self._behind = False  # whether something must run after a block
        self._waits_for = before([node for node in old.nodes if node.meta.get(STAGE)])
        for node in old.nodes:
            if _goes_number_by_number(node):
                if _count(node) != _count(next(iter(self._run), node)):
                    self._flush()
                self._run[node] = None
            else:
                if not self._run.keys().isdisjoint(self._waits_for.get(node, self._run)):
                    self._flush()
                self._copy(node)

    def compiled_beside(self, tensors: Sequence[Tensor], compile: Compile) -> Callable[..., Any] | None:
        """Compile what is beside the blocks, in front of them; None: it is much, has a leaf's size, or must wait.

        Args:
            tensors: what it is compiled for.
            compile: how.
        """
        rest = [node for node in self.graph.nodes if node.op == "call_function"]
        if self._behind or len(rest) > _FEW or any(map(_is_large, rest)):
            return None
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        modules = [(self.root.get_submodule(call.target), call.args) for call in calls]
        inputs, results = self.graph.find_nodes(op="placeholder"), cast(list[Node], self.graph.output_node().args[0])
        passed = list(dict.fromkeys(node for call in calls for node in call.all_input_nodes if node not in inputs))
        beside, copies = Graph(), dict[Node, Node]()
        for node in (*inputs, *rest):
            copies[node] = beside.node_copy(node, copies.__getitem__)
        beside.output([copies[node] for node in (*results, *passed)])
        compiled = compile(GraphModule(nn.Module(), beside), tensors)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            found: Sequence[Tensor] = compiled(*tensors)
            values = dict(zip((*inputs, *passed), (*tensors, *found[len(results) :]), strict=True))
            for blocks, arguments in modules:
                blocks(*(values[node] for node in arguments))
            return found[: len(results)]

        return run

    def _copy(self, node: Node) -> None:
        self._behind |= not self._done.isdisjoint(self._waits_for.get(node, ()))
        self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)

    def _flush(self) -> None:
        """Write the run, leaf by leaf."""
        run, self._run = [*self._run], {}
        for part in _apart(run):
            self._write(part)

    def _write(self, run: list[Node]) -> None:
        """Write operations as a module, or as they are, if they do more than to write over leaves."""
        renewals = [_Renewal.of(node) for node in run if any(_whole(given) not in run for given in written_by(node))]
        conditions = {renewal.condition for renewal in renewals if renewal}
        if any(user not in run for node in run for user in node.users) or None in renewals or len(conditions) != 1:
            for node in run:
                self._copy(node)
            return
        inputs = list(dict.fromkeys(i for node in run for i in node.all_input_nodes if i not in run))
        self._done.update(run)
        name = f"blocks_{self.runs}"
        self.runs += 1
        blocks = _Blocks(run, cast(list[_Renewal], renewals), inputs)
        if self._compile:
            blocks.compile_by(self._compile, self._kernels)
        self.root.add_module(name, blocks)
        self.graph.call_module(name, tuple(self._copies[node] for node in (*conditions, *inputs)))


def _apart(run: list[Node]) -> list[list[Node]]:
    """Part operations of one kind that have no tensor of a leaf's size in common."""
    of: dict[Node, list[Node]] = {}
    for node in run:
        met = [_whole(given) for given in node.all_input_nodes if _is_leaf(given, _count(node))]
        together = list({id(of[other]): of[other] for other in met if other in of}.values()) or [[]]
        first, *others = together
        for part in others:
            first += part
        first.append(node)
        of.update(dict.fromkeys([*first, *met], first))
        for other, part in of.items():
            if any(part is one for one in others):
                of[other] = first
    parts = {id(part): part for part in (of[node] for node in run)}.values()
    return [sorted(part, key=run.index) for part in parts]


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
        self._noises = [_Noise.of(node, inputs) for node in run if node.target is _NORMAL]
        self._in_blocks = [_is_leaf(node, count) for node in inputs]
        self._renewed = [inputs.index(renewal.old) for renewal in renewals]
        first = -self._noises[0].start % BLOCK if self._noises else 0  # or each block of noise were made twice
        self._bounds = sorted({0, *range(first, count, BLOCK), count})
        self._block = GraphModule(nn.Module(), _of_a_block(run, renewals, inputs))
        self._pairs: Pairs | None = None

    def compile_by(self, compile: Compile, kernels: Kernels) -> None:
        """Have whole blocks made by kernels that are compiled when they are first wanted, if noise is drawn once."""
        if len(self._noises) == 1:
            self._pairs = Pairs(self._block, self._in_blocks, self._noises[0].dtype, compile, kernels)

    def forward(self, condition: Tensor, *inputs: Tensor) -> None:
        """Run, if a condition holds."""
        if not condition:
            return
        flat = [t.reshape(-1) if cut else t for t, cut in zip(inputs, self._in_blocks, strict=True)]
        keys = [bytes(inputs[noise.key].tolist()) for noise in self._noises]
        for begin, end in pairwise(self._bounds):
            parts = [t[begin:end] if cut else t for t, cut in zip(flat, self._in_blocks, strict=True)]
            if self._pairs and self._noises[0].is_whole(begin, end):
                self._pairs(keys[0], self._noises[0].numel, self._noises[0].start + begin, parts)
            else:
                self._block(*(noise.drawn(inputs, begin, end) for noise in self._noises), *parts)
        for index in self._renewed:
            if not inputs[index].is_contiguous():
                inputs[index].copy_(flat[index].view_as(inputs[index]))


class _Noise(NamedTuple):
    """Noise that is drawn for a leaf, as `pegrad::aes_normal` is asked for it."""

    key: int
    """Which of the inputs it is drawn from."""
    numel: int
    start: int
    stop: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, node: Node, inputs: list[Node]) -> "_Noise":
        """Read an operation that draws."""
        key, *how = node.args
        return cls(inputs.index(cast(Node, key)), *cast(list[Any], how))

    def drawn(self, inputs: Sequence[Tensor], begin: int, end: int) -> Tensor:
        """Draw that of some of the leaf's numbers."""
        return _NORMAL(inputs[self.key], self.numel, self.start + begin, self.start + end, self.dtype, self.device)

    def is_whole(self, begin: int, end: int) -> bool:
        """Tell whether some of the leaf's numbers are those of one block of the cipher's, and all of it."""
        first = self.start + begin
        return first % AES_BLOCK == 0 and end - begin == min(AES_BLOCK, self.numel - first)


def _of_a_block(run: list[Node], renewals: list[_Renewal], inputs: list[Node]) -> Graph:
    """Return a graph that takes noise, if there is any, and inputs."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in [n for n in run if n.target is _NORMAL] + inputs}
    chosen = {renewal.chosen: renewal.new for renewal in renewals}
    in_place = {renewal.new: operation for renewal in renewals if (operation := _in_place(renewal, run))}
    done = {renewal.written for renewal in renewals if renewal.new in in_place}
    for node in run:
        if node in chosen:
            copies[node] = copies[chosen[node]]
        elif node.target in _SHAPING:
            copies[node] = copies[cast(Node, node.args[0])]
        elif node not in done and node.target is not _NORMAL:
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
    if not _is_large(node) or look.device != "cpu":
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


def _is_large(node: Node) -> bool:
    look = node.meta.get(LOOK)
    return isinstance(look, Look) and look.shape.numel() >= _LARGE


def _count(node: Node) -> int:
    return cast(Look, node.meta[LOOK]).shape.numel()


_ATEN = torch.ops.aten
_NORMAL = torch.ops.pegrad.aes_normal.default
_SHAPING = {_ATEN.view.default, _ATEN.detach.default, _ATEN.alias.default, unsafe_view.default}
_COPYING = {_ATEN.copy_.default, _ATEN.clone.default}
_PLAIN = {None, torch.contiguous_format, torch.preserve_format}
