"""`vmap`: the composition `vmap(grad(loss))`, by PyTorch's own batching rules (the literature's `multi`)."""

from torch import Tensor
from torch.func import grad_and_value, vmap

from pegrad.problem import Leaves, Problem, Values
from pegrad.rules.recurrent import BY_STEPS
from pegrad.strategies.base import Stacking
from pegrad.tracing.interception import Interception


class Vmap(Stacking):
    """Vectorise the gradient of one example over the batch.

    Source: Goodfellow 2015; TensorFlow Privacy's `vectorized_map`; `multi` in Rochette, Manoel & Tramel 2019.
    """

    def stacked(self, problem: Problem) -> tuple[Leaves, Values]:
        """See `Stacking.stacked`."""

        def loss(params: Leaves, example: Leaves) -> tuple[Tensor, Leaves]:
            with Interception(BY_STEPS):  # recurrent networks have no batching rule
                return problem.loss(params, example)

        gradient = grad_and_value(loss, has_aux=True)
        grads, (losses, aux) = vmap(gradient, in_dims=(None, 0), randomness="different")(problem.params, problem.batch)
        return grads, Values(losses, aux)
