"""AES-256 in counter mode, by `cryptography`, on the CPU: the words of its keystream, and normals block by block.

On an accelerator the arithmetic runs there, of words that are copied to it block by block.
"""

from collections.abc import Sequence
from threading import local
from typing import cast

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from pegrad.random.box_muller import Precision, box_muller, fill, precision_of

# Normals are made in blocks: working memory stays at a few megabytes, in cache, however large the request.
# Part of what a key means: another value gives other numbers.
BLOCK = 1 << 18


def keystream(derived: bytes, position: int = 0) -> CipherContext:
    """Start the keystream of a derived key, at a byte that is a multiple of the cipher's 16.

    The counter of the whole stream starts at 0 because the key is derived for this one stream.
    """
    return Cipher(algorithms.AES(derived), modes.CTR((position // 16).to_bytes(16, "big"))).encryptor()


_AT_ONCE = 1 << 16  # bytes: the zeros that are encrypted stay in the innermost caches


class Room:
    """Room for bytes of a keystream, taken again and again: new memory may cost as much as the cipher does.

    Args:
        size: how many at most.
    """

    def __init__(self, size: int) -> None:
        self._zeros = memoryview(bytes(min(size, _AT_ONCE)))
        # cryptography before 43 asks for room for one block more than it writes.
        self._buffer = memoryview(bytearray(size + 15))

    def taken(self, stream: CipherContext, size: int) -> Tensor:
        """Take the next `size` bytes of a keystream, `uint8`: overwritten by those that are taken after them."""
        self.enter(stream, 0, size)
        return self.entered(size)

    def enter(self, stream: CipherContext, begin: int, size: int) -> None:
        """Take the next `size` bytes of a keystream for the place that begins there."""
        for start in range(begin, begin + size, _AT_ONCE):
            count = min(_AT_ONCE, begin + size - start)
            stream.update_into(self._zeros[:count], self._buffer[start : start + count + 15])

    def entered(self, size: int) -> Tensor:
        """View the first `size` bytes, `uint8`."""
        return torch.from_numpy(np.frombuffer(self._buffer, np.uint8, size))


def _kept_room(size: int) -> Room:
    """Return room that this thread has had before, if it is enough: at most a few megabytes."""
    if getattr(_KEPT, "size", 0) < size:
        _KEPT.room, _KEPT.size = Room(size), size
    return cast(Room, _KEPT.room)


_KEPT = local()


def words(stream: CipherContext, count: int, word: torch.dtype, device: torch.device) -> Tensor:
    """Take the next `count` integers of a keystream."""
    return Room(count * word.itemsize).taken(stream, count * word.itemsize).view(word).to(device)


def normals(derived: bytes, numel: int, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw a part of `numel` standard normals from the keystream of a derived key, without the rest.

    Time and memory are those of the part and of at most two blocks of 2^18 numbers, wherever it begins.

    Args:
        derived: 32 bytes, derived for this one use.
        numel: how many numbers the whole has.
        start: the first number of the part.
        stop: one after the last.
        dtype: float64, float32, bfloat16 or float16.
        device: where the result lies.

    Returns:
        A tensor of shape (stop - start,).
    """
    precision = precision_of(dtype)
    first = start // BLOCK
    of_a_block = _bytes(BLOCK, precision)
    stream, room = keystream(derived, first * of_a_block), _kept_room(of_a_block)
    out = torch.empty(stop - start, dtype=precision.compute, device=device)
    for begin in range(first * BLOCK, stop, BLOCK):
        end = min(begin + BLOCK, numel)
        mine = out[max(begin - start, 0) : end - start]
        if mine.numel() == end - begin:
            _fill(stream, room, precision, mine)
        else:
            block = out.new_empty(end - begin)
            _fill(stream, room, precision, block)
            mine.copy_(block[max(start - begin, 0) :][: mine.numel()])
    return out.to(dtype)


TOGETHER = 1 << 14
"""Up to so many numbers are worth drawing together, whoever they are for."""


def each_normal(
    derived: Sequence[bytes], numels: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Draw all the normals of several derived keys, of few numbers each, in hardly more operations than of one.

    Args:
        derived: 32 bytes each; see `normals`.
        numels: how many numbers each has, at most 2^18.
        dtype: see `normals`.
        device: see `normals`.

    Returns:
        For each what `normals` returns, bit for bit.
    """
    precision = precision_of(dtype)
    pairs = [(numel + 1) // 2 for numel in numels]
    radius, angle = torch.int64.itemsize, precision.word.itemsize
    radii, angles, begin = Room(sum(pairs) * radius), Room(sum(pairs) * angle), 0
    for key, count in zip(derived, pairs, strict=True):
        stream = keystream(key)
        radii.enter(stream, begin * radius, count * radius)
        angles.enter(stream, begin * angle, count * angle)
        begin += count
    radius_words = radii.entered(begin * radius).view(torch.int64).to(device)
    angle_words = angles.entered(begin * angle).view(precision.word).to(device)
    halves = (half.to(dtype).split(pairs) for half in box_muller(radius_words, angle_words, precision))
    return [torch.cat([cos, sin])[:numel] for numel, cos, sin in zip(numels, *halves, strict=True)]


def words_of_block(derived: bytes, numel: int, begin: int, precision: Precision) -> tuple[Tensor, Tensor]:
    """Take what a block of `numel` standard normals is made of: `box_muller`'s integers, of radii and of angles.

    The block's first half are the pairs' r·cos θ, its second half their r·sin θ.

    Args:
        derived: see `normals`.
        numel: how many numbers the whole has.
        begin: the block's first number, a multiple of 2^18.
        precision: of the numbers.

    Returns:
        Two tensors, half as long as the block, rounded up: on the CPU, and good until this thread next draws.
    """
    of_a_block = _bytes(BLOCK, precision)
    stream, numbers = keystream(derived, begin // BLOCK * of_a_block), min(BLOCK, numel - begin)
    return _next_words(stream, _kept_room(of_a_block), numbers, precision)


def _bytes(numbers: int, precision: Precision) -> int:
    return (numbers + 1) // 2 * (torch.int64.itemsize + precision.word.itemsize)


def _next_words(stream: CipherContext, room: Room, numbers: int, precision: Precision) -> tuple[Tensor, Tensor]:
    taken = room.taken(stream, _bytes(numbers, precision))
    radii = (numbers + 1) // 2 * torch.int64.itemsize
    return taken[:radii].view(torch.int64), taken[radii:].view(precision.word)


def _fill(stream: CipherContext, room: Room, precision: Precision, out: Tensor) -> None:
    """Fill a flat tensor with normals of the next words."""
    radius_words, angle_words = _next_words(stream, room, out.numel(), precision)
    fill(out, radius_words.to(out.device), angle_words.to(out.device), precision)


@torch.library.custom_op("pegrad::aes_normal", mutates_args=())
def aes_normal(derived: Tensor, numel: int, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`normals`, as one operation of a graph, which takes the derived key as a tensor, `uint8` of shape (32,)."""
    return normals(bytes(derived.tolist()), numel, start, stop, dtype, device)


@torch.library.custom_op("pegrad::each_aes_normal", mutates_args=())
def each_aes_normal(derived: Tensor, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`each_normal`, as one operation of a graph, which takes the derived keys as a tensor, of shape (n, 32)."""
    return each_normal([*map(bytes, derived.tolist())], numels, dtype, device)


@each_aes_normal.register_fake
def _(derived: Tensor, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.empty(numel, dtype=dtype, device=device) for numel in numels]


@aes_normal.register_fake
def _(derived: Tensor, numel: int, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(stop - start, dtype=dtype, device=device)
