"""Draws from a key: uniforms, normals, a part of them, permutations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pegrad.errors import ArgumentError
from pegrad.random import aes, chacha
from pegrad.random.box_muller import precision_of, uniform_of
from pegrad.random.ciphers import NORMAL, UNIFORM, Cipher, chosen
from pegrad.random.keys import derive_for, natural


def uniform(
    key: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cipher: Cipher | None = None,
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
        cipher: see `normal`.

    Returns:
        A tensor of the given shape, dtype and device.

    Raises:
        ArgumentError: `key` is not a key, the shape is not one, or the dtype is none of the four.
    """
    precision = precision_of(dtype)
    shape = _shape(shape)
    numel, device = math.prod(shape), torch.empty(0, device=device).device
    cipher = chosen(cipher, device)
    derived = derive_for(key, UNIFORM[cipher])
    if cipher is Cipher.CHACHA20:
        return chacha.uniforms(_words(derived, device), numel, 0, dtype).view(shape)
    words = aes.words(aes.keystream(derived), numel, precision.word, device)
    return uniform_of(words, precision).to(dtype).view(shape)


def normal(
    key: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cipher: Cipher | None = None,
) -> Tensor:
    """Draw independent standard normals from a cipher's keystream.

    Guarantee:
        Each pair of values is Box–Muller's function, r·cos θ and r·sin θ, of keystream words that no other
        pair uses. The radius has 64 bits for every dtype, so the largest magnitude is sqrt(128·ln 2) = 9.419,
        which a normal exceeds with probability 5e-21; the angle has 32 bits for float32, 64 for float64.
        bfloat16 and float16 are float32 normals rounded. The two ciphers of one key have different derived keys.
        Tests: `test_normal_follows_the_law`, `test_no_value_is_shared`, `test_purposes_use_different_streams`.

    Args:
        key: the key, `uint8` of shape (32,).
        shape: the shape of the result.
        dtype: float64, float32, bfloat16 or float16.
        device: where the result lies; None is torch's default device.
        cipher: None is AES for the CPU and ChaCha20 for accelerators. The same key gives other numbers by each.

    Returns:
        A tensor of the given shape, dtype and device.

    Raises:
        ArgumentError: `key` is not a key, the shape is not one, the dtype is none of the four, the cipher is none of
            the two, or a graph is being traced.

    Source:
        Box and Muller, "A note on the generation of random normal deviates", 1958.

    Example:
        >>> from pegrad import random
        >>> random.normal(random.key(0), (2, 3)).shape
        torch.Size([2, 3])
    """
    shape = _shape(shape)
    numel = math.prod(shape)
    return normal_slice(key, numel, 0, numel, dtype=dtype, device=device, cipher=cipher).view(shape)


def normal_slice(
    key: Tensor,
    numel: int,
    start: int,
    stop: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cipher: Cipher | None = None,
) -> Tensor:
    """Draw a part of what `normal` would draw, without the rest: a shard's noise, say.

    Time and memory are those of the part and of at most two blocks, wherever it begins: of 2^18 numbers by AES, of ten
    by ChaCha20.

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
        cipher: see `normal`; the same for every part.

    Returns:
        A tensor of shape (stop - start,) of the given dtype and device.

    Raises:
        ArgumentError: as `normal`, or the part does not lie within the whole.
    """
    precision_of(dtype)
    numel, start, stop = checked_part(numel, start, stop)
    device = torch.empty(0, device=device).device
    cipher = chosen(cipher, device)
    return normal_slice_from(derive_for(key, NORMAL[cipher]), numel, start, stop, dtype, device, cipher)


def normal_slice_from(
    derived: bytes, numel: int, start: int, stop: int, dtype: torch.dtype, device: torch.device, cipher: Cipher
) -> Tensor:
    """Draw what `normal_slice` does of a key that gives these 32 bytes for the purpose; nothing is checked."""
    if cipher is Cipher.AES:
        return aes.normals(derived, numel, start, stop, dtype, device)
    words, at_once = _words(derived, device), chacha.at_once(device)
    if stop - start <= at_once:
        return chacha.normals(words, stop - start, start, dtype)
    out = torch.empty(stop - start, dtype=dtype, device=device)
    for begin in range(start, stop, at_once):
        count = min(at_once, stop - begin)
        out[begin - start :][:count] = chacha.normals(words, count, begin, dtype)
    return out


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
    stream = aes.keystream(derive_for(key, b"pegrad permute"))
    words = aes.words(stream, natural("n", n), torch.int64, torch.device("cpu"))
    return torch.argsort(words, stable=True)


def checked_part(numel: int, start: int, stop: int) -> tuple[int, int, int]:
    """Return the numbers of a part, having checked that it lies within its whole.

    Raises:
        ArgumentError: one is not an integer, or not 0 <= start <= stop <= numel.
    """
    numel, start, stop = natural("numel", numel), natural("start", start), natural("stop", stop)
    if not start <= stop <= numel:
        raise ArgumentError(f"Expected start <= stop <= numel, got start={start}, stop={stop}, numel={numel}.")
    return numel, start, stop


def _words(derived: bytes, device: torch.device) -> Tensor:
    return chacha.key_words(torch.tensor(list(derived), dtype=torch.uint8, device=device))


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        raise ArgumentError(f"Expected shape to be a sequence of integers, got {type(shape).__name__}.")
    return tuple(natural("shape", size) for size in shape)
