"""AES-256 in counter mode, by `cryptography`, on the CPU: the words of its keystream, and normals block by block.

On an accelerator the arithmetic runs there, of words that are copied to it block by block.
"""

from collections.abc import Sequence
from threading import local

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray
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


Bytes = NDArray[np.uint8]

_AT_ONCE = 1 << 17  # bytes: zeros that are encrypted, and words that become floats, stay in a core's own caches


class Room:
    """Room for bytes of a keystream, taken again and again: new memory may cost as much as the cipher does.

    Args:
        size: how many at most.
    """

    def __init__(self, size: int) -> None:
        self._zeros = memoryview(bytes(min(size, _AT_ONCE)))
        # cryptography before 43 asks for room for one block more than it writes.
        self._buffer = memoryview(bytearray(size + 15))
        self._bytes = np.frombuffer(self._buffer, np.uint8, size)

    def taken(self, stream: CipherContext, size: int) -> Bytes:
        """Take the next `size` bytes of a keystream: overwritten by those that are taken after them."""
        self.enter(stream, 0, size)
        return self.entered(size)

    def enter(self, stream: CipherContext, begin: int, size: int) -> None:
        """Take the next `size` bytes of a keystream for the place that begins there."""
        for start in range(begin, begin + size, _AT_ONCE):
            count = min(_AT_ONCE, begin + size - start)
            stream.update_into(self._zeros[:count], self._buffer[start : start + count + 15])

    def entered(self, size: int) -> Bytes:
        """View the first `size` bytes."""
        return self._bytes[:size]


class BlockRoom:
    """Room for what a block of normals is made of, taken again and again.

    Words of radii become floats a few at a time, in memory that no other core reads. To write again what another core
    has read takes several times as long as the cipher does, where the two share no cache; and Inductor makes floats of
    64-bit integers one by one, which takes as long as a logarithm.

    Args:
        precision: of the normals.
        numbers: how many at most.
    """

    def __init__(self, precision: Precision, numbers: int) -> None:
        pairs = (numbers + 1) // 2
        self.numbers = numbers
        self._precision = precision
        self._some = Room(min(pairs * 8, _AT_ONCE))
        self._radii = np.empty(pairs, str(precision.compute).removeprefix("torch."))
        self._angles = Room(pairs * precision.word.itemsize)

    def taken(self, stream: CipherContext, numbers: int) -> tuple[Tensor, Tensor]:
        """Take the words of the next `numbers` normals: see `words_of_block`."""
        radii = self._radii[: (numbers + 1) // 2]
        for start in range(0, len(radii), _AT_ONCE // 8):
            some = radii[start : start + _AT_ONCE // 8]
            some[:] = self._some.taken(stream, 8 * len(some)).view(np.int64)
        angles = self._angles.taken(stream, len(radii) * self._precision.word.itemsize)
        return torch.from_numpy(radii), torch.from_numpy(angles).view(self._precision.word)

    @staticmethod
    def kept(precision: Precision, numbers: int) -> "BlockRoom":
        """Return room that this thread has had before, if it is enough: one or two megabytes for a block."""
        room = _KEPT.rooms.get(precision)
        if room is None or room.numbers < numbers:
            room = _KEPT.rooms[precision] = BlockRoom(precision, numbers)
        return room


class _Kept(local):
    def __init__(self) -> None:
        self.rooms: dict[Precision, BlockRoom] = {}


_KEPT = _Kept()


def words(stream: CipherContext, count: int, word: torch.dtype, device: torch.device) -> Tensor:
    """Take the next `count` integers of a keystream."""
    taken = Room(count * word.itemsize).taken(stream, count * word.itemsize)
    return torch.from_numpy(taken).view(word).to(device)


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
    stream, room = _stream_of_block(derived, first, precision), BlockRoom.kept(precision, min(BLOCK, numel))
    out = torch.empty(stop - start, dtype=precision.compute, device=device)
    for begin in range(first * BLOCK, stop, BLOCK):
        end = min(begin + BLOCK, numel)
        mine = out[max(begin - start, 0) : end - start]
        if mine.numel() == end - begin:
            _fill(mine, *room.taken(stream, end - begin), precision)
        else:
            block = out.new_empty(end - begin)
            _fill(block, *room.taken(stream, end - begin), precision)
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
    radius_words = torch.from_numpy(radii.entered(begin * radius)).view(torch.int64).to(device)
    angle_words = torch.from_numpy(angles.entered(begin * angle)).view(precision.word).to(device)
    halves = (half.to(dtype).split(pairs) for half in box_muller(radius_words, angle_words, precision))
    return [torch.cat([cos, sin])[:numel] for numel, cos, sin in zip(numels, *halves, strict=True)]


def words_of_block(derived: bytes, numel: int, begin: int, precision: Precision) -> tuple[Tensor, Tensor]:
    """Take what a block of `numel` standard normals is made of: `box_muller`'s words, those of radii as floats.

    The block's first half are the pairs' r·cos θ, its second half their r·sin θ.

    Args:
        derived: see `normals`.
        numel: how many numbers the whole has.
        begin: the block's first number, a multiple of 2^18.
        precision: of the numbers.

    Returns:
        Two tensors, half as long as the block, rounded up: on the CPU, and good until this thread next draws.
    """
    stream = _stream_of_block(derived, begin // BLOCK, precision)
    numbers = min(BLOCK, numel - begin)
    return BlockRoom.kept(precision, numbers).taken(stream, numbers)


def _stream_of_block(derived: bytes, block: int, precision: Precision) -> CipherContext:
    return keystream(derived, block * (BLOCK // 2) * (torch.int64.itemsize + precision.word.itemsize))


def _fill(out: Tensor, radius_words: Tensor, angle_words: Tensor, precision: Precision) -> None:
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
