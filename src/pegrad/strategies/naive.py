"""`naive`: one gradient after another. Slow, obvious, and what the others are checked against."""

import torch
from torch import Tensor
from torch.func import grad_and_value

from pegrad.rules.recurrent import PACKED_BY_STEPS
from pegrad.strategies.base import Leaves, Problem, Strategy, Values
from pegrad.tracing.interception import Interception


class Naive(Strategy):
    """Loop over the examples; the only strategy under which the loss may be any Python at all."""

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Strategy.stacked`."""

        def unpacked(params: Leaves, example: Leaves) -> tuple[Tensor, Leaves]:
            with Interception(PACKED_BY_STEPS):
                return problem.loss(params, example)

        gradient = grad_and_value(unpacked, has_aux=True)
        grads, losses, auxes = [], [], []
        for b in range(problem.batch_size):
            grad, (loss, aux) = gradient(problem.params, [leaf[b] for leaf in problem.batch])
            grads.append(grad)
            losses.append(loss)
            auxes.append(aux)
        return _stack(grads), Values(torch.stack(losses), _stack(auxes))


def _stack(rows: list[Leaves]) -> Leaves:
    return [torch.stack(column) for column in zip(*rows, strict=True)]
