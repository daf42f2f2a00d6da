"""What a call of one of PyTorch's recurrent functions asks for, whichever of them it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.errors import StrategyError

States = tuple[Tensor, ...]
"""The hidden state, and of an LSTM the cell's after it."""


class Weights(NamedTuple):
    """The weights of one layer in one direction, named as in PyTorch's modules."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None
    """What projects an LSTM's hidden state, if anything does."""


Layer = Callable[[Tensor, States, Weights, bool], tuple[Tensor, States]]
"""`(input (N, T, d), states (N, ·), weights, backwards) -> (output (N, T, p), states (N, ·))`"""


@dataclass(frozen=True)
class Sequences:
    """A call over whole sequences, N of them with T steps each.

    Args:
        input: `(N, T, d)`, or `(T, N, d)` unless `batch_first`.
        states: each `(layers * directions, N, ·)`.
        weights: for each layer, of one direction after the other.
        directions: 1, or 2 if every layer also runs backwards.
        dropout: probability of dropout between layers.
        batch_first: the order of the axes of input and output.
    """

    input: Tensor
    states: States
    weights: list[Weights]
    directions: int
    dropout: float
    batch_first: bool

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the call."""
        yield self.input
        yield from self.states
        for weights in self.weights:
            yield from (w for w in weights if w is not None)

    def run(self, layer: Layer) -> tuple[Tensor, ...]:
        """Run layer upon layer: the output, shaped like the input, and the last states, shaped like the first."""
        x = self.input if self.batch_first else self.input.transpose(0, 1)
        last: list[States] = []
        for first in range(0, len(self.weights), self.directions):
            if first and self.dropout:
                x = F.dropout(x, self.dropout)
            outputs = []
            for i in range(first, first + self.directions):
                output, states = layer(x, tuple(s[i] for s in self.states), self.weights[i], i > first)
                outputs.append(output)
                last.append(states)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        x = x if self.batch_first else x.transpose(0, 1)
        return x, *(torch.stack(column) for column in zip(*last, strict=True))


@dataclass(frozen=True)
class Step:
    """A call of a cell: one step, of one sequence `(d,)` or several `(N, d)`."""

    input: Tensor
    states: States
    weights: Weights

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the call."""
        yield self.input
        yield from self.states
        yield from (w for w in self.weights if w is not None)


def read_sequences(
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Sequences:
    """Read the arguments of `torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu`, packed sequences excepted."""
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    weights = []
    for start in range(0, len(params), each):
        ih, hh, *rest = params[start : start + each]
        biases = [rest.pop(0) for _ in range(2)] if has_biases else [None, None]
        weights.append(Weights(ih, hh, *biases, *rest))
    return Sequences(input, _states(hx), weights, directions, dropout if train else 0.0, batch_first)


def read_step(
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Step:
    """Read the arguments of `torch.lstm_cell`, `gru_cell`, `rnn_tanh_cell` and `rnn_relu_cell`."""
    return Step(input, _states(hx), Weights(w_ih, w_hh, b_ih, b_hh))


def _states(hx: Tensor | Sequence[Tensor]) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def is_packed(args: Sequence[Any]) -> bool:
    """Tell whether one of the functions over sequences is given packed ones: `(data, batch_sizes, hx, ...)`."""
    return len(args) > 3 and isinstance(args[1], Tensor) and not isinstance(args[3], bool)


def refuse_packed(*args: Any, **kwargs: Any) -> Any:
    """Stand in for what packs sequences, or runs over packed ones, where all examples run at once.

    Raises:
        StrategyError: always.
    """
    raise StrategyError(
        "The loss packs sequences (pack_padded_sequence), so that its examples have no steps in common and cannot run "
        "at once: give the recurrent module the padded sequence and mask what comes after its end out of the loss, as "
        "in (error * (torch.arange(T) < length)).sum(), or use strategy='naive', a loop over the examples"
    )
