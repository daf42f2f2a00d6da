"""Results written over what nothing reads any more: at its peak, a backward pass needs that much less.

Autograd adds gradients up and takes them through activations into new memory, while the old is let go a moment later.
In a graph it is known who reads what last.
"""

import torch
from torch.fx import Graph, Node

from pegrad.compiling.nodes import LOOK, MEMORY, STAGE

_ATEN = torch.ops.aten
_INTO = {
    _ATEN.add.Tensor: (_ATEN.add.out, "out"),
    _ATEN.sub.Tensor: (_ATEN.sub.out, "out"),
    _ATEN.mul.Tensor: (_ATEN.mul.out, "out"),
    _ATEN.div.Tensor: (_ATEN.div.out, "out"),
    **{
        operation.default: (operation.grad_input, "grad_input")
        for operation in (
            _ATEN.threshold_backward,
            _ATEN.gelu_backward,
            _ATEN.silu_backward,
            _ATEN.sigmoid_backward,
            _ATEN.tanh_backward,
            _ATEN.leaky_relu_backward,
            _ATEN.elu_backward,
            _ATEN.softplus_backward,
        )
    },
}
"""Operations that read each number once, where they write one: the same into a given tensor, and its name there."""


def reuse(graph: Graph, stage: int) -> None:
    """Let operations of a stage write over an input that nothing reads after them.

    What is written over was made in the same stage, is all that lies in its memory, and looks like the result.

    Args:
        graph: of operations, in place.
        stage: its number.
    """
    last = {
        source.meta[MEMORY]: node for node in graph.nodes for source in node.all_input_nodes if MEMORY in source.meta
    }
    merged: dict[Node, Node] = {}

    def home(node: Node) -> Node:
        """Return the node that made the memory in which a value lies by now."""
        made = node.meta[MEMORY]
        while made in merged:
            made = merged[made]
        return made

    for node in graph.nodes:
        if node.target not in _INTO or node.meta[STAGE] != stage:
            continue
        homes = [home(source) for source in node.all_input_nodes]
        for source, made in zip(node.all_input_nodes, homes, strict=True):
            own = made.meta.get(STAGE) == stage and homes.count(made) == 1  # an input of the graph has no stage
            if own and last[made] is node and _alike(source, node) and _whole(source, made):
                node.target, name = _INTO[node.target]
                node.kwargs = {**node.kwargs, name: source}
                merged[node] = made
                last[made] = last.get(node, node)
                break


def _alike(source: Node, node: Node) -> bool:
    return bool(source.meta[LOOK] == node.meta[LOOK])


def _whole(source: Node, made: Node) -> bool:
    return bool(source.meta[LOOK].shape.numel() == made.meta[LOOK].shape.numel())
