"""The order of a graph's last stage: leaf by leaf, so that what one needs is let go before it is the next one's turn.

Optimizers go over all leaves for each thing that they work out, and so does noise: at their peak there are several
copies of everything. A graph may be run in any order that keeps what each operation reads and writes.
"""

from collections import defaultdict
from typing import Any

import torch
from torch.fx import Graph, Node

from pegrad import trees
from pegrad.compiling.nodes import KIN, MEMORY, STAGE, written_by
from pegrad.torch_internals import Operation


def leaf_by_leaf(graph: Graph, stage: int) -> None:
    """Put the operations of a graph's last stage in another order.

    Args:
        graph: of operations, in place; those of the stages before have the `KIN`, the leaves.
        stage: the number of the last stage.
    """
    leaves = {node: index for index, node in enumerate(node for node in graph.nodes if KIN in node.meta)}
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.meta[STAGE] == stage]
    if not leaves or not nodes:  # not a step's: a gradient's order is that of its backward pass
        return
    waits_for = before(nodes)
    first: dict[Node, int] = {}  # of the leaves that it is made of
    for node in nodes:
        of = [leaves[source] for source in node.all_input_nodes if source in leaves]
        first[node] = min([*of, *(first[other] for other in waits_for[node])], default=len(leaves))
    wanted = {other for node in nodes for other in waits_for[node]}
    ends = sorted((node for node in nodes if node not in wanted), key=first.__getitem__)
    last = nodes[0].prev
    for node in _in_turn(ends, waits_for):
        last.append(node)
        last = node


def before(nodes: list[Node]) -> dict[Node, list[Node]]:
    """Return what must run before each operation: what makes its inputs, and what reads or writes the same memory."""
    own = set(nodes)
    writer: dict[Node, Node] = {}
    readers: dict[Node, list[Node]] = defaultdict(list)
    drawn: list[Node] = []
    found: dict[Node, list[Node]] = {}
    for node in nodes:
        inputs = node.all_input_nodes
        places = [_place(source) for source in inputs]
        others = [source for source in inputs if source in own] + [writer[p] for p in places if p in writer]
        for place in {_place(source): None for source in _tensors(written_by(node))}:
            others += readers.pop(place, [])
            writer[place] = node
        for place in places:
            readers[place].append(node)
        if _draws(node):  # from torch's generators, in turn
            others += drawn
            drawn = [node]
        found[node] = [other for other in dict.fromkeys(others) if other is not node]
    return found


def _in_turn(ends: list[Node], waits_for: dict[Node, list[Node]]) -> list[Node]:
    """List each end, and in front of it what must run before."""
    order: dict[Node, None] = {}
    for end in ends:
        waiting = [end]
        while waiting:
            node = waiting[-1]
            missing = [other for other in waits_for[node] if other not in order]
            if missing:
                waiting += reversed(missing)
            else:
                order[waiting.pop()] = None
    return list(order)


def _place(node: Node) -> Node:
    """Return what stands for the memory that a value lies in; several values of one operation lie in their own."""
    place: Node = node.meta.get(MEMORY, node)
    return place


def _tensors(arguments: list[Any]) -> list[Node]:
    """Return the nodes among arguments, and in lists of them."""
    return [leaf for leaf in trees.leaves(arguments) if isinstance(leaf, Node)]


def _draws(node: Node) -> bool:
    return isinstance(node.target, Operation) and torch.Tag.nondeterministic_seeded in node.target.tags
