"""Run a function of PyTorch's that is written in Python such that a mode sees the calls that it makes."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def inlined(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the body of a function that asks first whether a mode wants the call: the same code, the answer being no.

    `F.multi_head_attention_forward` is such a function. Given whole to a mode, it hides the linear maps it is made of;
    its body, run with the mode on, shows each of them.

    Args:
        function: any function.

    Returns:
        A function of the same arguments; or None where there is no such body: the function is not written in Python,
        is not PyTorch's, or does not ask.
    """
    if not isinstance(function, FunctionType) or not _of_torch(function):
        return None
    checks = [name for name in _CHECKS if name in function.__code__.co_names and name in function.__globals__]
    if not checks:
        return None
    names = function.__globals__ | dict.fromkeys(checks, _no)
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _of_torch(function: FunctionType) -> bool:
    name = function.__globals__.get("__name__", "")  # not `__module__`, which a decorator may copy from elsewhere
    return name == "torch" or name.startswith("torch.")


def _no(*args: Any) -> bool:
    return False
