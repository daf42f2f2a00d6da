"""Keys: 256 secret bits that a run's noise and draws come from, and how keys are derived from each other.

Whoever has a key can make the noise again and subtract it. So a key is a tensor that prints as `key(…)`, alone or in
whatever holds it, and so does all that is made of its bytes: a copy, a slice, a stack of keys.
"""

import hashlib
import operator
import secrets
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_default_nowrap_functions

from pegrad.errors import ArgumentError
from pegrad.torch_internals import without_subclasses

KEY_BYTES = 32
_FOLD_IN = b"pegrad fold_in"


class Key(Tensor):
    """A `uint8` tensor of shape (32,) that does not print its values. Made by `pegrad.random.key`.

    It is saved and loaded like any tensor, and what else is computed from it (a comparison, a sum) is a plain tensor.
    `tolist`, `item` and `numpy` give the values themselves, and so does a file that a key is saved in.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation as on plain tensors, and hide the bytes that it returns."""
        result = Tensor.__torch_function__(func, (), args, kwargs)
        return result if func in get_default_nowrap_functions() else _hide(result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "key(…)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Key":
        return memo.setdefault(id(self), self.clone())


# For torch.load's default, weights_only=True; the second is its name in files of pegrad 0.2.
torch.serialization.add_safe_globals([Key, (Key, "pegrad.keys.Key")])


def key(seed: int | None = None) -> Key:
    """Make a key from the operating system's entropy, or from a seed.

    Args:
        seed: None, for a run that is private. Otherwise a non-negative integer of any size, hashed to 256 bits, to
            repeat an experiment: a run from a seed is private only from those who cannot guess it.

    Returns:
        The key, `uint8` of shape (32,), on the CPU. Keep it secret, and the seed with it: whoever has either can
        subtract the noise.

    Raises:
        ArgumentError: the seed is negative or not an integer.

    Example:
        >>> key(0)
        key(…)
        >>> bool((key(0) == key(0)).all()), bool((key(0) == key(1)).all())
        (True, False)
    """
    if seed is None:
        return as_key(secrets.token_bytes(KEY_BYTES))
    return as_key(derive(b"", b"pegrad seed", natural("seed", seed)))


def check_key(key: Tensor) -> None:
    """Refuse what is not a key.

    Raises:
        ArgumentError: `key` is not a `uint8` tensor of shape (32,).
    """
    if not isinstance(key, Tensor):
        raise ArgumentError(f"Expected a key, got {type(key).__name__}; pegrad.random.key makes one.")
    if key.dtype != torch.uint8 or key.shape != (KEY_BYTES,):
        raise ArgumentError(
            f"Expected a key, torch.uint8 of shape ({KEY_BYTES},), got {key.dtype} of shape "
            f"{tuple(key.shape)}; pegrad.random.key makes one."
        )


def fold_in(key: Tensor, data: int) -> Key:
    """Derive the key that belongs to a number: a step, an epoch, the index of a leaf.

    Args:
        key: the parent key, `uint8` of shape (32,).
        data: a non-negative integer of any size; different numbers give independent keys.

    Returns:
        The derived key, `uint8` of shape (32,), on the CPU. Like its parent, it must stay secret.

    Raises:
        ArgumentError: `key` is not a key, or `data` is negative or not an integer.
    """
    return as_key(derive(key_bytes(key), _FOLD_IN, natural("data", data)))


def split(key: Tensor, num: int = 2) -> tuple[Key, ...]:
    """Derive several independent keys, none of them reachable by `fold_in`.

    Args:
        key: the parent key, `uint8` of shape (32,).
        num: how many keys, at least 1.

    Returns:
        `num` keys, each `uint8` of shape (32,), on the CPU.

    Raises:
        ArgumentError: `key` is not a key, or `num` is not a positive integer.

    Example:
        >>> noise_key, sample_key = split(key(0))
    """
    if natural("num", num) < 1:
        raise ArgumentError(f"Expected num >= 1 keys to split into, got num={num}.")
    parent = key_bytes(key)
    return tuple(as_key(derive(parent, b"pegrad split", index)) for index in range(operator.index(num)))


def derive(key: bytes, purpose: bytes, data: int) -> bytes:
    """Derive 256 bits from a key, a purpose of at most 16 bytes and a number of any size, by keyed BLAKE2b."""
    encoded = data.to_bytes((data.bit_length() + 7) // 8, "little")
    return hashlib.blake2b(encoded, digest_size=KEY_BYTES, key=key, person=purpose).digest()


def derive_for(key: Tensor, purpose: bytes) -> bytes:
    """Derive the 256 bits that a key gives for a purpose.

    Raises:
        ArgumentError: `key` is not a key, or a graph is being traced.
    """
    return derive(key_bytes(key), purpose, 0)


def derive_for_each(key: Tensor, uses: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Derive, for each number and purpose, what `derive_for(fold_in(key, number), purpose)` would.

    Raises:
        ArgumentError: `key` is not a key, or a graph is being traced.
    """
    parent = key_bytes(key)
    return [derive(derive(parent, _FOLD_IN, number), purpose, 0) for number, purpose in uses]


def as_key(digest: bytes) -> Key:
    """Make a key of 32 bytes."""
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8).as_subclass(Key)


def key_bytes(key: Tensor) -> bytes:
    """Return the 32 bytes of a key, having checked that it is one, and that no graph will hold them.

    Guarantee: nothing that is computed from a key's bytes becomes a constant of a graph that is being traced, which
    would draw the same numbers at every run. Test: `test_no_key_is_baked_into_a_graph`.

    Raises:
        ArgumentError: `key` is not a key, or a graph is being traced.
    """
    if _tracer() is not None:
        raise ArgumentError(
            "Expected no graph to be traced where a key's bytes are read: whatever is derived from them would be a "
            "constant of the graph, and its noise the same at every run. Derive keys outside, by "
            "pegrad.random.leaf_keys, make them an input of the graph, and draw by each_normal_from."
        )
    with without_subclasses():  # `Key` would look at all that is read
        check_key(key)
        return bytes(key.tolist())


def refuse_constant(derived: Tensor) -> None:
    """Refuse a derived key that would be a constant of the graph that is being traced.

    Raises:
        ArgumentError: a graph is being traced, and the key is not computed from its inputs.
    """
    tracer = _tracer()
    if tracer is None or _is_from_inputs(derived, tracer):
        return
    raise ArgumentError(
        "Expected the derived key to be an input of the graph that is being traced, got a tensor from outside: the "
        "graph would hold it as a constant, and draw the same noise at every run. Pass it as an argument."
    )


def _tracer() -> Any:
    """Return what traces a graph at this moment, by `make_fx` or `torch.export`; None: nothing does.

    Not asked of dynamo: every tensor that it meets is an input of its graph, and reading a key's bytes ends the graph.
    """
    if torch.compiler.is_dynamo_compiling() or "torch.fx.experimental.proxy_tensor" not in sys.modules:
        return None
    mode = sys.modules["torch.fx.experimental.proxy_tensor"].get_proxy_mode()
    return None if mode is None else mode.tracer


def _is_from_inputs(derived: Tensor, tracer: Any) -> bool:
    proxy_tensor = sys.modules["torch.fx.experimental.proxy_tensor"]
    proxy = proxy_tensor.get_proxy_slot(derived, tracer, None)
    nodes = [] if proxy is None else [proxy.proxy.node]
    for node in nodes:  # all that it is computed from; the list grows
        nodes += [source for source in node.all_input_nodes if source not in nodes]
    return bool(nodes) and all(node.op != "get_attr" for node in nodes)


def natural(name: str, value: int) -> int:
    """Return an integer, having checked that it is one and not negative."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"Expected {name} to be an integer, got {type(value).__name__}.") from None
    if number < 0:
        raise ArgumentError(f"Expected {name} >= 0, got {name}={number}.")
    return number


def _hide(result: Any) -> Any:
    """Make keys of the byte tensors that an operation on a key returned."""
    if isinstance(result, Tensor):
        hidden = isinstance(result, Key) or result.dtype != torch.uint8
        return result if hidden else result.as_subclass(Key)
    if isinstance(result, tuple | list):
        return type(result)(map(_hide, result))
    return result
