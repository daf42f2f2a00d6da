"""A block's noise and update as one compiled kernel: normals are made of a cipher's words where they are used.

Box and Muller's function makes two numbers of a pair of words, and those lie half a block apart. So a kernel takes some
pairs of words, and of every leaf-like tensor both places. It is compiled for a few sizes: a large one, and smaller ones
for what a block has beside.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pegrad.random import aes
from pegrad.random.box_muller import box_muller, precision_of

Compile = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]
"""From a graph and tensors that are like its inputs to a function of such tensors."""
Kernels = dict[Hashable, Callable[..., Any]]
"""What was compiled, by all that it depends on."""

_SIZES = (1 << 17, 1 << 15, 1 << 14, 1 << 12)  # pairs that a kernel takes; fewer run as they are


class Pairs:
    """Runs on a block of noise, and the same numbers of a leaf.

    Args:
        body: what is done with noise: from that, and from tensors of as many numbers, or of no dimension, in place.
        cut: for each of the body's inputs but the noise, whether it has as many numbers.
        dtype: of the noise.
        compile: makes a function of a graph.
        kernels: what has been compiled for other leaves, and is added to.
    """

    def __init__(
        self, body: GraphModule, cut: Sequence[bool], dtype: torch.dtype, compile: Compile, kernels: Kernels
    ) -> None:
        self._body = body
        self._cut = cut
        self._dtype = dtype
        self._precision = precision_of(dtype)
        self._compile = compile
        self._kernels = kernels
        self._name = _name(body.graph)

    def __call__(self, derived: bytes, numel: int, begin: int, parts: Sequence[Tensor]) -> None:
        """Run.

        Args:
            derived: what the leaf's noise is drawn from.
            numel: how many numbers that has.
            begin: the block's first number.
            parts: the body's inputs but the noise.
        """
        words = aes.words_of_block(derived, numel, begin, self._precision)
        pairs, at = len(words[0]), 0
        count = min(aes.BLOCK, numel - begin)
        for size in _SIZES:
            while at + size <= count - pairs:
                tensors = self._some(words, parts, at, at + size, pairs)
                self._kernel(size, tensors)(*tensors)
                at += size
        if at < pairs:
            self._run(*self._some(words, parts, at, pairs, pairs))

    def _some(
        self, words: Sequence[Tensor], parts: Sequence[Tensor], start: int, stop: int, pairs: int
    ) -> list[Tensor]:
        """Take some pairs of words, the parts at their first numbers, and what is cut at their second ones."""
        firsts = [t[start:stop] if cut else t for t, cut in zip(parts, self._cut, strict=True)]
        seconds = [t[pairs + start : pairs + stop] for t, cut in zip(parts, self._cut, strict=True) if cut]
        return [*(t[start:stop] for t in words), *firsts, *seconds]

    def _run(self, radius_words: Tensor, angle_words: Tensor, *parts: Tensor) -> None:
        cosines, sines = box_muller(radius_words, angle_words, self._precision)
        firsts, seconds = parts[: len(self._cut)], iter(parts[len(self._cut) :])
        others = [next(seconds) if cut else t for t, cut in zip(firsts, self._cut, strict=True)]
        self._body(cosines.to(self._dtype), *firsts)
        numbers = next(t.numel() for t, cut in zip(others, self._cut, strict=True) if cut)
        self._body(sines[:numbers].to(self._dtype), *others)

    def _kernel(self, size: int, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        key = self._name, size, self._dtype, tuple((t.dtype, t.shape) for t in tensors)
        if key not in self._kernels:
            graph = Graph()
            inputs = [graph.placeholder(f"input_{index}") for index in range(len(tensors))]
            graph.call_function(self._run, tuple(inputs))
            graph.output(())
            like = [torch.zeros_like(t) for t in tensors]  # apart in memory
            self._kernels[key] = self._compile(GraphModule(nn.Module(), graph), like)
        return self._kernels[key]


def _name(graph: Graph) -> Hashable:
    """Tell a graph from others by what its nodes do, to which nodes before them."""
    places = {node: f"node {place}" for place, node in enumerate(graph.nodes)}

    def name(node: Node) -> Hashable:
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), places.__getitem__)
        return node.op, "" if node.op == "placeholder" else str(node.target), repr(arguments)

    return tuple(map(name, graph.nodes))
