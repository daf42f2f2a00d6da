"""Let a function of one's own have a rule."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pegrad import trees


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make calls of a function visible to `pegrad`, so that it can have a rule of its own.

    Without a rule the function is right all the same: each example then gets a copy of its parameters.

    Args:
        function: any function of tensors. Inside, PyTorch's functions are not looked at one by one any more.

    Returns:
        A function that does the same, and may stand as a key in `BookKeeping(rules={function: rule})`. A rule is
        `(trace, *args, **kwargs) -> value` or `NotImplemented`; it calls `trace.record`, see `pegrad.Site` and
        `tests/test_rules.py` for a whole one.

    >>> import pegrad, torch
    >>> @pegrad.operation
    ... def gated(x, gate):
    ...     return x * torch.sigmoid(gate)
    >>> pegrad.per_example_grad(lambda p, x: gated(x, p).sum())(torch.zeros(2), torch.eye(2))
    tensor([[0.2500, 0.0000],
            [0.0000, 0.2500]])
    """

    @wraps(function)
    def visible(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in trees.leaves((args, kwargs)) if isinstance(t, Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(visible, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return visible
