"""See when the loss calls `torch.utils.checkpoint`, before it has gone wrong."""

from pegrad.errors import StrategyError
from pegrad.torch_internals import SAVES_INPUTS, saved_tensors_hooks


def refuse_checkpoint() -> None:
    """Raise if what runs is wrapped in `torch.utils.checkpoint`.

    It runs again in the backward pass, when no tensor knows its example any more, and a module has its own weights back
    in place of those that `functional_call` gave it: the gradients might be wrong in silence.

    Raises:
        StrategyError: it is.
    """
    hooks = saved_tensors_hooks()
    if hooks and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        raise StrategyError(
            "The loss calls torch.utils.checkpoint, which runs it again when functional_call has given the module its "
            "own weights back: call pegrad.checkpoint in its place (for a model of Hugging Face's, "
            "model._set_gradient_checkpointing(gradient_checkpointing_func=pegrad.checkpoint))"
        )


def of_checkpoint(error: Exception) -> bool:
    """Tell whether an error comes of `torch.utils.checkpoint`, before its hooks are in force: so in PyTorch 2.11."""
    return SAVES_INPUTS in str(error)
