"""PyTorch's recurrent functions as sites of their weights and biases: one for the input, one for the hidden state."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.numerics import without_autocast
from pegrad.rules.bias import Bias, over_leading
from pegrad.rules.gram import Gram, SharedGram, gram
from pegrad.rules.linear import LinearWeight, linear
from pegrad.rules.recurrent.calls import States, Weights, is_packed, read_sequences, read_step, refuse_packed
from pegrad.rules.recurrent.lstm import LSTM
from pegrad.rules.recurrent.steps import CELLS, SEQUENCES, Cell, has_steps, recur
from pegrad.rules.recurrent.sweeps import GRU, Elman, Sweep, Swept
from pegrad.rules.site import Recorder, Rule, Send, Site
from pegrad.torch_internals import PACK, PAD

_SWEEPS: dict[Any, Sweep] = {
    torch.lstm: LSTM(),
    torch.gru: GRU(),
    torch.rnn_tanh: Elman(relu=False),
    torch.rnn_relu: Elman(relu=True),
}


def _over_sequences(function: Any) -> Rule:
    sweep, cell, name = _SWEEPS[function], SEQUENCES[function], function.__name__

    def rule(trace: Recorder, *args: Any, **kwargs: Any) -> Any:
        if is_packed(args):
            refuse_packed()
        call = read_sequences(*args, **kwargs)
        if not has_steps(call):
            return NotImplemented
        witness = next(t for t in call.tensors() if trace.is_batched(t))

        def layer(x: Tensor, states: States, weights: Weights, backwards: bool) -> tuple[Tensor, States]:
            x = _batched(trace, x, witness)
            states = tuple(_own(trace, state, witness) for state in states)
            if not (x.numel() and weights.ih.numel()) or any(trace.is_batched(w) for w in weights):
                return _by_steps(trace, cell, x, states, weights, backwards)
            return _swept(trace, name, sweep, x, states, weights, backwards)

        return call.run(layer)

    return rule


def _swept(
    trace: Recorder, name: str, sweep: Sweep, x: Tensor, states: States, weights: Weights, backwards: bool
) -> tuple[Tensor, States]:
    shared = SharedGram() if sweep.adds else gram

    def sites(weight: Tensor | None, bias: Tensor | None, operation: str, gram_of_g: Gram) -> list[Site]:
        found: list[Site] = []
        if weight is not None and trace.is_parameter(weight):
            found.append(LinearWeight(weight, f"{name} {operation}", gram_of_g))
        if bias is not None and trace.is_parameter(bias):
            found.append(Bias(bias, f"{name} {operation} bias", over_leading(1)))
        return found

    given: Any = (None if w is None else w.detach() for w in weights)
    detached = Weights(*given)
    if sweep.adds and detached.bias_ih is not None and detached.bias_hh is not None:
        detached = detached._replace(bias_ih=detached.bias_ih + detached.bias_hh, bias_hh=None)

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        ih = F.linear(x, detached.ih)  # with a bias it would be copied once more
        dtype = torch.promote_types(ih.dtype, detached.hh.dtype)
        rows, channels, outputs = (len(x), x.shape[1:-1].numel()), states[0].shape[-1], ih.shape[-1]

        def announce(sites: list[Site], x: int, y: int, dtype: torch.dtype) -> Send | None:
            return trace.announce(sites, (*rows, x), (*rows, y), dtype) if sites else None

        sends = (
            announce(sites(weights.ih, weights.bias_ih, "input", shared), x.shape[-1], outputs, x.dtype),
            announce(sites(weights.hh, weights.bias_hh, "hidden", shared), channels, outputs, dtype),
            announce(sites(weights.hr, None, "projection", gram), states[-1].shape[-1], channels, dtype),
        )
        anchor = next((send.anchor for send in sends if send is not None), None)
        ih, *first = (t.to(dtype) for t in (ih, *states))
        bias = None if detached.bias_ih is None else detached.bias_ih.to(dtype)
        with without_autocast(ih.device):
            return Swept.apply(sweep, detached._replace(bias_ih=bias), backwards, sends, anchor, x.detach(), ih, *first)

    output, *last = trace.run(run, x, *states)
    return output, tuple(last)


def _by_steps(
    trace: Recorder, cell: Cell, x: Tensor, states: States, weights: Weights, backwards: bool
) -> tuple[Tensor, States]:
    """Run a layer of whose weights some differ from example to example, or which has no sequence to run over."""
    ih = _product(trace, x, weights.ih, weights.bias_ih)
    return recur(cell, ih, states, Weights(*(_own(trace, w, ih) for w in weights)), backwards)


def _product(trace: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = linear(trace, x, weight, bias)
    if y is NotImplemented:
        y = F.linear(x, _own(trace, weight, x), _own(trace, bias, x))
    return y


def _own(trace: Recorder, weight: Any, witness: Tensor) -> Any:
    return trace.expand(weight, witness) if trace.is_parameter(weight) else weight


def _batched(trace: Recorder, tensor: Tensor, witness: Tensor) -> Tensor:
    if trace.is_batched(tensor):
        return tensor
    if trace.is_parameter(tensor):
        return trace.expand(tensor, witness)
    return trace.run(lambda tensor, like: tensor.clone(), tensor.detach(), witness)


def _in_one_step(cell: Cell) -> Rule:
    def rule(trace: Recorder, *args: Any, **kwargs: Any) -> Any:
        call = read_step(*args, **kwargs)
        witness = next(t for t in call.tensors() if trace.is_batched(t))
        x = _batched(trace, call.input, witness)
        states = tuple(_batched(trace, state, witness) for state in call.states)
        w = call.weights
        states = cell(_product(trace, x, w.ih, w.bias_ih), _product(trace, states[0], w.hh, w.bias_hh), states)
        return states if len(states) > 1 else states[0]

    return rule


def _refuse(trace: Recorder, *args: Any, **kwargs: Any) -> Any:
    return refuse_packed()


RULES: dict[Any, Rule] = {
    **{function: _over_sequences(function) for function in SEQUENCES},
    **{function: _in_one_step(cell) for function, cell in CELLS.items()},
    PACK: _refuse,
    PAD: _refuse,
}
