"""A call as a graph: every operation that it runs, plain ones of PyTorch's, from tensors to tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pegrad.assumptions import assuming
from pegrad.compiling.pieces import Pieces
from pegrad.errors import CompileError, PegradError


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded call.

    Args:
        graph: from the tensors among the leaves of the arguments to those of the value, and last a boolean scalar:
            whether what was assumed of the arguments holds.
        value: the value's structure and those of its leaves that are no tensors.
    """

    graph: GraphModule
    value: Pieces

    @property
    def operations(self) -> int:
        """How many there are in the graph."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)


def record(function: Callable[[Any], Any], inputs: Any) -> Recording:
    """Call a function, and note every operation.

    Args:
        function: a pure function from a pytree to a pytree.
        inputs: its argument. What is no tensor among the leaves is taken as it is.

    Raises:
        CompileError: what the function does depends on its arguments' numbers in a way that no graph can follow.
        PegradError: as the function.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    structure, tensors = Pieces.of(inputs)
    value: list[Pieces] = []

    def flat(*given: Tensor) -> list[Tensor]:
        with assuming() as assumptions:
            rest, outputs = Pieces.of(function(structure.filled(given)))
            value.append(rest)
            return [*outputs, assumptions.held(given[0])]

    with torch.no_grad():
        plain = [t.detach().as_subclass(Tensor) for t in tensors]
        try:
            graph = make_fx(flat)(*plain)
        except PegradError:
            raise
        except Exception as error:
            raise CompileError(
                f"The call cannot be recorded: it ended with a {type(error).__name__} (above). Numbers of its "
                "arguments' may be asked for in Python (if, .item(), a key that is among the arguments)"
            ) from error
    _check(graph)
    return Recording(graph, value[-1])


def _check(graph: GraphModule) -> None:
    """Refuse a graph in which the shape of something depends on numbers: it would be that of the example."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        masked = node.target is torch.ops.aten.index.Tensor and any(map(_is_mask, node.args[1]))
        if masked or torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            raise CompileError(
                f"The shape of what {node.target} returns depends on numbers, so it cannot be recorded for others: "
                "write it with torch.where, or leave it to eager PyTorch"
            )


def _is_mask(index: Any) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)
