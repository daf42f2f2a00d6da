"""What PyTorch says about a loss that it cannot transform, said in words about the loss."""

import re

from pegrad.torch_internals import SAVES_INPUTS

_IN_PLACE = "The loss writes in place to {}: build a new tensor instead (torch.stack, torch.where, a + b)"
_ASKS = (
    "The loss asks a tensor for its value (if, while, float(), .item()), and examples may give different answers: "
    "write it with torch.where"
)

_EXPLANATIONS = (
    (
        "mutate a captured Tensor",
        "The loss writes in place to a tensor that it neither made nor was given, so it is not a pure function. "
        "If that is a batch normalisation in training mode counting its batches: use group or layer "
        "normalisation, or freeze the statistics (module.eval())",
    ),
    (r"\.item\(\)", _ASKS),
    ("data-dependent control flow", _ASKS),
    (
        "Cannot access data pointer",
        "The loss, or a function of PyTorch's that it calls, reads the numbers of a tensor (.tolist(), .numpy(), ...), "
        "which no transform of torch.func shows it",
    ),
    ("dynamic shape|masked_select", "The loss makes a tensor whose size depends on the example"),
    (
        "saved tensor hooks",
        "The loss saves tensors in its own way (torch.utils.checkpoint, saved_tensors_hooks), which no transform of "
        "torch.func supports: leave that out, and save memory by pegrad.checkpoint or microbatch_size",
    ),
    (
        "escaped from inside a function being vmapped",
        "The loss runs again in the backward pass (torch.utils.checkpoint, saved_tensors_hooks), where the examples "
        "are no longer apart: leave that out, and save memory by pegrad.checkpoint or microbatch_size",
    ),
    (
        "must override the setup_context",
        "The loss calls a torch.autograd.Function whose forward takes ctx (torch.utils.checkpoint with "
        "use_reentrant=True is one, and so are module backward hooks): split forward and setup_context, and set "
        "generate_vmap_rule = True; for checkpointing, call pegrad.checkpoint",
    ),
    (
        SAVES_INPUTS,
        "The loss calls torch.utils.checkpoint, which no transform of torch.func supports: call pegrad.checkpoint in "
        "its place",
    ),
    (
        "does not have vmap support",
        "The loss calls a torch.autograd.Function without a rule for vmap: set generate_vmap_rule = True",
    ),
    (
        "accessing `data` under vmap",
        "The loss reads .data of a tensor, as TorchScript does: call the function that was scripted",
    ),
    (
        r"backward\(\) called inside a functorch transform",
        "The loss calls backward(), which writes to .grad: use torch.func.grad for a gradient inside a loss",
    ),
    ("vmap: inplace arithmetic", _IN_PLACE.format("a shared tensor what differs from example to example")),
    ("leaf Variable that requires grad is being used in an in-place", _IN_PLACE.format("its parameters")),
    ("modified by an inplace operation", _IN_PLACE.format("a tensor whose value the backward pass still needs")),
    ("in[- ]?place", _IN_PLACE.format("a tensor that the examples share")),
    (
        "element 0 of tensors does not require grad",
        "The loss calls torch.autograd.grad on tensors that record no graph of their own here: use torch.func.grad "
        "for a gradient inside a loss",
    ),
    (r"(aten::\w+(\.\w+)?)", r"PyTorch cannot vectorise \1, which the loss calls"),
)
"""What errors of PyTorch's say, as a regular expression, and what that means for a loss of one example."""


def explanation(error: BaseException) -> str | None:
    """Return what an error of PyTorch's means for the loss, if that is known: in words that hold no number of it."""
    if not isinstance(error, RuntimeError):
        return None
    found = ((re.search(pattern, str(error)), meaning) for pattern, meaning in _EXPLANATIONS)
    return next((match.expand(meaning) for match, meaning in found if match), None)
