"""Stateless random numbers for privacy: 256-bit keys, a cipher's keystream, Box–Muller normals.

A key (`pegrad.keys`) is a `torch.uint8` tensor of shape (32,) that prints as `key(…)`, so a training state that carries
one is tensors and numbers. A key is for one use: derive a fresh one for each with `fold_in` or `split`. Derivation is
BLAKE2b keyed with the parent and personalised by purpose, so no two purposes ever meet in one derived key. Numbers come
from the keystream of AES-256 in counter mode under a derived key; torch does the arithmetic.

What must stay secret, for as long as what was made with it is to stay private: every key, the seed that a key was made
from, and whatever a key is derived from. Whoever has the key of a run can make its noise again and subtract it. A key
lies in the state of a run, so a checkpoint that is published must be one without the state.

On an accelerator: the keystream is always made on the CPU, by the same cipher, and copied block by block to
the device, where the arithmetic runs. The bits are the same on every device; the floating-point results may
differ in the last places, as each device has its own `log`, `cos` and `sin`.

Not guaranteed: a float is a rounded real, so the low bits of a noisy value can betray what the noise was
added to (Mironov, "On significance of the least significant bits for differential privacy", CCS 2012); the
time that a call takes is not hidden; keys lie in ordinary memory and are not wiped.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from pegrad import trees
from pegrad.errors import ArgumentError, LeafError
from pegrad.keys import Key, as_key, check_key, derive, fold_in, key, key_bytes, natural, split

__all__ = [
    "Key",
    "Part",
    "check_key",
    "each_normal",
    "fold_in",
    "key",
    "normal",
    "normal_slice",
    "permutation",
    "split",
    "torch_generators",
    "tree_normal",
    "uniform",
]

# Normals are made in blocks: working memory stays at a few megabytes, in cache, however large the request.
# Part of what a key means: another value gives other numbers.
_BLOCK = 1 << 18


class _Precision(NamedTuple):
    """How numbers of one dtype are made."""

    compute: torch.dtype  # the arithmetic runs in this
    word: torch.dtype  # one word of keystream for each uniform and for each angle
    resolution: int  # uniforms are multiples of 2**-resolution


_SINGLE = _Precision(torch.float32, torch.int32, 24)
_DOUBLE = _Precision(torch.float64, torch.int64, 53)
_PRECISION = {
    torch.float64: _DOUBLE,
    torch.float32: _SINGLE,
    torch.bfloat16: _SINGLE,
    torch.float16: _SINGLE,
}


class Part(NamedTuple):
    """A part of a flat tensor."""

    numel: int
    """Of the whole."""
    start: int
    stop: int


def uniform(
    key: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniforms in (0, 1], never 0.

    Values are k/2^r with k uniform in {1, ..., 2^r}, without rounding: r = 53 for float64, 24 for float32.
    So `uniform(...) <= p` has probability floor(p·2^r)/2^r, never more than p. bfloat16 and float16 are the
    float32 values rounded.

    Args:
        key: the key, `uint8` of shape (32,).
        shape: the shape of the result.
        dtype: float64, float32, bfloat16 or float16.
        device: where the result lies; None is torch's default device.

    Returns:
        A tensor of the given shape, dtype and device.

    Raises:
        ArgumentError: `key` is not a key, the shape is not one, or the dtype is none of the four.
    """
    precision = _precision(dtype)
    shape = _shape(shape)
    target = torch.empty(0, device=device).device
    words = _words(_keystream(key, b"pegrad uniform"), math.prod(shape), precision.word, target)
    words.bitwise_and_((1 << precision.resolution) - 1).add_(1)
    return words.to(precision.compute).mul_(2.0**-precision.resolution).to(dtype).view(shape)


def normal(
    key: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw independent standard normals from a cipher's keystream.

    Guarantee:
        Each pair of values is Box–Muller's function, r·cos θ and r·sin θ, of keystream words that no other
        pair uses. The radius has 64 bits for every dtype, so the largest magnitude is sqrt(128·ln 2) = 9.419,
        which a normal exceeds with probability 5e-21; the angle has 32 bits for float32, 64 for float64.
        bfloat16 and float16 are float32 normals rounded. Tests: `test_normal_follows_the_law`,
        `test_no_value_is_shared`.

    Args:
        key: the key, `uint8` of shape (32,).
        shape: the shape of the result.
        dtype: float64, float32, bfloat16 or float16.
        device: where the result lies; None is torch's default device.

    Returns:
        A tensor of the given shape, dtype and device.

    Raises:
        ArgumentError: `key` is not a key, the shape is not one, or the dtype is none of the four.

    Source:
        Box and Muller, "A note on the generation of random normal deviates", 1958.

    Example:
        >>> normal(key(0), (2, 3)).shape
        torch.Size([2, 3])
    """
    shape = _shape(shape)
    numel = math.prod(shape)
    return normal_slice(key, numel, 0, numel, dtype=dtype, device=device).view(shape)


def normal_slice(
    key: Tensor,
    numel: int,
    start: int,
    stop: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a part of what `normal` would draw, without the rest: a shard's noise, say.

    Time and memory are those of the part and of at most two blocks of 2^18 numbers, wherever it begins.

    Guarantee:
        `normal(key, (numel,), ...)[start:stop]`, bit for bit, so parts that do not overlap share no value of the
        keystream, and parts that cover everything are the whole. Test: `test_a_slice_is_that_of_the_whole`.

    Args:
        key: the key, `uint8` of shape (32,).
        numel: how many numbers the whole has.
        start: the first number of the part, at least 0.
        stop: one after the last, from `start` to `numel`.
        dtype: float64, float32, bfloat16 or float16.
        device: where the result lies; None is torch's default device.

    Returns:
        A tensor of shape (stop - start,) of the given dtype and device.

    Raises:
        ArgumentError: `key` is not a key, the part does not lie within the whole, or the dtype is none of the four.
    """
    precision = _precision(dtype)
    numel, start, stop = natural("numel", numel), natural("start", start), natural("stop", stop)
    if not start <= stop <= numel:
        raise ArgumentError(f"Expected start <= stop <= numel, got start={start}, stop={stop}, numel={numel}.")
    first = start // _BLOCK
    of_a_block = _BLOCK // 2 * (torch.int64.itemsize + precision.word.itemsize)
    stream = _keystream(key, b"pegrad normal", first * of_a_block)
    out = torch.empty(stop - start, dtype=precision.compute, device=device)
    for begin in range(first * _BLOCK, stop, _BLOCK):
        end = min(begin + _BLOCK, numel)
        mine = out[max(begin - start, 0) : end - start]
        if mine.numel() == end - begin:
            _box_muller(stream, precision, mine)
        else:
            block = out.new_empty(end - begin)
            _box_muller(stream, precision, block)
            mine.copy_(block[max(start - begin, 0) :][: mine.numel()])
    return out.to(dtype)


def tree_normal(key: Tensor, tree: trees.PyTree) -> trees.PyTree:
    """Draw independent standard normals in the shape of a pytree.

    Guarantee:
        No two leaves share a stream: leaf number i draws from `fold_in(key, i)`. Test:
        `test_no_value_is_shared`.

    Args:
        key: the key, `uint8` of shape (32,).
        tree: a pytree of floating-point tensors; only shapes, dtypes and devices are read.

    Returns:
        A pytree of the same structure, each leaf with the shape, dtype and device of its model.

    Raises:
        ArgumentError: `key` is not a key.
        LeafError: a leaf is not a tensor of float64, float32, bfloat16 or float16.
    """
    return trees.unflatten(trees.flatten(tree)[1], list(each_normal(key, tree)))


def each_normal(key: Tensor, tree: trees.PyTree, parts: Sequence[Part | None] = ()) -> Iterator[Tensor]:
    """Draw the leaves of `tree_normal` one by one, each when it is asked for; arguments and errors are the same.

    Args:
        key: see `tree_normal`.
        tree: see `tree_normal`.
        parts: for each leaf, which part of a larger one it is, whose noise is wanted; None or missing: it is whole.
    """
    leaves = trees.leaves(tree)
    for path, leaf in zip(trees.paths(tree), leaves, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dtype not in _PRECISION:
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise LeafError(f"Expected a floating-point tensor at leaf {path}, got {kind}.")
    looks = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]  # holds no leaf
    check_key(key)

    def drawn() -> Iterator[Tensor]:
        for index, ((shape, dtype, device), part) in enumerate(zip_longest(looks, parts)):
            numel, start, stop = part or Part(shape.numel(), 0, shape.numel())
            yield normal_slice(fold_in(key, index), numel, start, stop, dtype=dtype, device=device).view(shape)

    return drawn()


def permutation(key: Tensor, n: int) -> Tensor:
    """Draw a uniform permutation of 0, ..., n - 1.

    It is the order of n random 64-bit words. Equal words would keep their order, a bias too rare to be seen:
    the probability that any two are equal is below n²/2^65, which is 3e-8 for n = 1,000,000.

    Args:
        key: the key, `uint8` of shape (32,).
        n: how many numbers, at least 0.

    Returns:
        `int64` of shape (n,), on the CPU.

    Raises:
        ArgumentError: `key` is not a key, or `n` is negative or not an integer.
    """
    words = _words(_keystream(key, b"pegrad permute"), natural("n", n), torch.int64, torch.device("cpu"))
    return torch.argsort(words, stable=True)


@contextmanager
def torch_generators(key: Tensor, tree: trees.PyTree = None) -> Iterator[None]:
    """Run torch's own random functions (dropout, say) from a key, and leave torch's generators as they were.

    Torch's generators are fast and not made for privacy: never draw noise from them. Their seed is derived for this
    purpose alone, so what they give tells nothing of what else is drawn with the key.

    Args:
        key: the key, `uint8` of shape (32,).
        tree: a pytree of tensors; the generators of their devices are meant, beside that of the CPU.

    Raises:
        ArgumentError: `key` is not a key.
    """
    seed = int.from_bytes(derive(key_bytes(key), b"pegrad torch", 0)[:8], "little")
    devices = {leaf.device for leaf in trees.leaves(tree)} - {torch.device("cpu"), torch.device("meta")}
    kind = next((device.type for device in devices), "cpu")
    indices = [device.index for device in devices]
    with torch.random.fork_rng(indices, device_type=kind):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices that are not forked
        for index in indices:
            with torch.accelerator.device_index(index):
                torch.get_device_module(kind).manual_seed(seed)
        yield


def _box_muller(stream: CipherContext, precision: _Precision, out: Tensor) -> None:
    """Fill a flat tensor with normals: r·cos θ in its first half, r·sin θ in its second."""
    pairs = (out.numel() + 1) // 2
    radius_words = _words(stream, pairs, torch.int64, out.device)
    angle_words = _words(stream, pairs, precision.word, out.device)
    # Signed words have the finest spacing around 0, where the tail of the normal lies.
    radius = _centred(radius_words, precision).abs_().mul_(2.0**-63).log_().mul_(-2).sqrt_()
    angle = _centred(angle_words, precision).mul_(2 * math.pi / 2 ** (8 * precision.word.itemsize))
    cosines, sines = out[:pairs], out[pairs:]
    torch.cos(angle, out=cosines).mul_(radius)
    torch.sin(angle[: sines.numel()], out=sines).mul_(radius[: sines.numel()])


def _centred(words: Tensor, precision: _Precision) -> Tensor:
    """Signed words as floats, moved by half a unit: symmetric around 0, and never 0."""
    return words.to(precision.compute).add_(0.5)


def _words(stream: CipherContext, count: int, word: torch.dtype, device: torch.device) -> Tensor:
    """Take the next `count` integers of a keystream."""
    size = count * word.itemsize
    # cryptography before 43 asks for room for one block more than it writes.
    buffer = bytearray(size + 15)
    stream.update_into(bytes(size), buffer)
    return torch.from_numpy(np.frombuffer(buffer, np.uint8, size)).view(word).to(device)


def _keystream(key: Tensor, purpose: bytes, position: int = 0) -> CipherContext:
    """Start the keystream of a key for one purpose, at a byte that is a multiple of the cipher's 16.

    The counter of the whole stream starts at 0 because the AES key is derived for this one stream.
    """
    derived = derive(key_bytes(key), purpose, 0)
    return Cipher(algorithms.AES(derived), modes.CTR((position // 16).to_bytes(16, "big"))).encryptor()


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        raise ArgumentError(f"Expected shape to be a sequence of integers, got {type(shape).__name__}.")
    return tuple(natural("shape", size) for size in shape)


def _precision(dtype: torch.dtype) -> _Precision:
    if dtype not in _PRECISION:
        names = ", ".join(str(known) for known in _PRECISION)
        raise ArgumentError(f"Expected dtype to be one of {names}, got dtype={dtype}.")
    return _PRECISION[dtype]


def leaf_keys(key: Tensor, leaves: int) -> Tensor:
    return torch.stack(
        [as_key(derive(key_bytes(fold_in(key, i)), b"pegrad normal", 0)) for i in range(leaves)]
    ).as_subclass(Tensor)


@torch.library.custom_op("pegrad::aes_normal", mutates_args=())
def aes_normal(row: Tensor, like: Tensor) -> Tensor:
    derived = bytes(row.tolist())
    stream = Cipher(algorithms.AES(derived), modes.CTR((0).to_bytes(16, "big"))).encryptor()
    precision = _precision(like.dtype)
    numel = like.numel()
    out = torch.empty(numel, dtype=precision.compute)
    for begin in range(0, numel, _BLOCK):
        _box_muller(stream, precision, out[begin : begin + _BLOCK])
    return out.to(like.dtype).view(like.shape)


@aes_normal.register_fake
def _(row, like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def normal_from(row: Tensor, like: Tensor) -> Tensor:
    return aes_normal(row, like)
