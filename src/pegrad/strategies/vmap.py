"""`vmap`: the composition `vmap(grad(loss))`, by PyTorch's own batching rules (the literature's `multi`)."""

from torch.func import grad_and_value, vmap

from pegrad.strategies.base import Leaves, Problem, Strategy, Values


class Vmap(Strategy):
    """Vectorise the gradient of one example over the batch.

    Source: Goodfellow 2015; TensorFlow Privacy's `vectorized_map`; `multi` in Rochette, Manoel & Tramel 2019.
    """

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Strategy.stacked`."""
        gradient = grad_and_value(problem.loss, has_aux=True)
        grads, (losses, aux) = vmap(gradient, in_dims=(None, 0), randomness="different")(problem.params, problem.batch)
        return grads, Values(losses, aux)
