"""What PyTorch says about a loss that it cannot transform, said in words about the loss."""

from collections.abc import Iterator
from contextlib import contextmanager

from pegrad.errors import LossError

_NAIVE = "or use strategy='naive', a loop over the examples"
_IN_PLACE = "The loss writes in place to {}: build a new tensor instead (torch.stack, torch.where, a + b), " + _NAIVE

_EXPLANATIONS = {
    "mutate a captured Tensor": (
        "The loss writes in place to a tensor that it neither made nor was given, so it is not a pure function. "
        "If that is a batch normalisation in training mode counting its batches: use group or layer "
        "normalisation, or freeze the statistics (module.eval())"
    ),
    ".item() on a Tensor": (
        "The loss asks a tensor for its value (if, while, float(), .item()), and examples may give different answers: "
        f"write it with torch.where, {_NAIVE}"
    ),
    "data-dependent control flow": (
        "The loss asks a tensor for its value (if, while, float(), .item()), and examples may give different answers: "
        f"write it with torch.where, {_NAIVE}"
    ),
    "saved tensor hooks": (
        "The loss saves tensors in its own way (torch.utils.checkpoint, saved_tensors_hooks), which no transform of "
        "torch.func supports: leave that out, and bound the memory by microbatch_size"
    ),
    "escaped from inside a function being vmapped": (
        "The loss runs again in the backward pass (torch.utils.checkpoint, saved_tensors_hooks), where the examples "
        "are no longer apart: leave that out, and bound the memory by microbatch_size"
    ),
    "must override the setup_context": (
        "The loss calls a torch.autograd.Function whose forward takes ctx (torch.utils.checkpoint with "
        "use_reentrant=True is one, and so are module backward hooks): split forward and setup_context, and set "
        "generate_vmap_rule = True; for checkpointing, leave it out and bound the memory by microbatch_size"
    ),
    "does not have vmap support": (
        f"The loss calls a torch.autograd.Function without a rule for vmap: set generate_vmap_rule = True, {_NAIVE}"
    ),
    "accessing `data` under vmap": (
        f"The loss reads .data of a tensor, as TorchScript does: call the function that was scripted, {_NAIVE}"
    ),
    "backward() called inside a functorch transform": (
        "The loss calls backward(), which writes to .grad: use torch.func.grad for a gradient inside a loss"
    ),
    "vmap: inplace arithmetic": _IN_PLACE.format("a shared tensor what differs from example to example"),
    "leaf Variable that requires grad is being used in an in-place": _IN_PLACE.format("its parameters"),
    "modified by an inplace operation": _IN_PLACE.format("a tensor whose value the backward pass still needs"),
    "element 0 of tensors does not require grad": (
        "The loss calls torch.autograd.grad on tensors that record no graph of their own here: use torch.func.grad "
        f"for a gradient inside a loss, {_NAIVE}"
    ),
    "Batching rule not implemented": f"The loss calls an operation that PyTorch cannot vmap: replace it, {_NAIVE}",
}


def explanation(error: BaseException) -> str | None:
    """Return what an error of PyTorch's means for the loss, if that is known."""
    if not isinstance(error, RuntimeError):
        return None
    said = str(error)
    return next((text for needle, text in _EXPLANATIONS.items() if needle in said), None)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what PyTorch raises about the loss into a `LossError`, with the original as its cause."""
    try:
        yield
    except RuntimeError as error:
        text = explanation(error)
        if text is None:
            raise
        raise LossError(text) from error
