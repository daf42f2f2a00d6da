"""`naive`: one gradient after another. Slow, obvious, and what the others are checked against."""

import torch
from torch.func import grad_and_value

from pegrad.strategies.base import Leaves, Problem, Strategy, Values


class Naive(Strategy):
    """Loop over the examples; the only strategy under which the loss may be any Python at all."""

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Strategy.stacked`."""
        gradient = grad_and_value(problem.loss, has_aux=True)
        grads, losses, auxes = [], [], []
        for b in range(problem.batch_size):
            grad, (loss, aux) = gradient(problem.params, [leaf[b] for leaf in problem.batch])
            grads.append(grad)
            losses.append(loss)
            auxes.append(aux)
        return _stack(grads), Values(torch.stack(losses), _stack(auxes))


def _stack(rows: list[Leaves]) -> Leaves:
    return [torch.stack(column) for column in zip(*rows, strict=True)]
