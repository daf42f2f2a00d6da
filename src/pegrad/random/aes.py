"""AES-256 in counter mode, by `cryptography`, on the CPU: the words of its keystream, and normals block by block.

On an accelerator the arithmetic runs there, of words that are copied to it block by block.
"""

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from pegrad.random.box_muller import Precision, fill, precision_of

# Normals are made in blocks: working memory stays at a few megabytes, in cache, however large the request.
# Part of what a key means: another value gives other numbers.
_BLOCK = 1 << 18


def keystream(derived: bytes, position: int = 0) -> CipherContext:
    """Start the keystream of a derived key, at a byte that is a multiple of the cipher's 16.

    The counter of the whole stream starts at 0 because the key is derived for this one stream.
    """
    return Cipher(algorithms.AES(derived), modes.CTR((position // 16).to_bytes(16, "big"))).encryptor()


def words(stream: CipherContext, count: int, word: torch.dtype, device: torch.device) -> Tensor:
    """Take the next `count` integers of a keystream."""
    size = count * word.itemsize
    # cryptography before 43 asks for room for one block more than it writes.
    buffer = bytearray(size + 15)
    stream.update_into(bytes(size), buffer)
    return torch.from_numpy(np.frombuffer(buffer, np.uint8, size)).view(word).to(device)


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
    first = start // _BLOCK
    of_a_block = _BLOCK // 2 * (torch.int64.itemsize + precision.word.itemsize)
    stream = keystream(derived, first * of_a_block)
    out = torch.empty(stop - start, dtype=precision.compute, device=device)
    for begin in range(first * _BLOCK, stop, _BLOCK):
        end = min(begin + _BLOCK, numel)
        mine = out[max(begin - start, 0) : end - start]
        if mine.numel() == end - begin:
            _fill(stream, precision, mine)
        else:
            block = out.new_empty(end - begin)
            _fill(stream, precision, block)
            mine.copy_(block[max(start - begin, 0) :][: mine.numel()])
    return out.to(dtype)


def _fill(stream: CipherContext, precision: Precision, out: Tensor) -> None:
    """Fill a flat tensor with normals of the next words."""
    pairs = (out.numel() + 1) // 2
    radius_words = words(stream, pairs, torch.int64, out.device)
    angle_words = words(stream, pairs, precision.word, out.device)
    fill(out, radius_words, angle_words, precision)


@torch.library.custom_op("pegrad::aes_normal", mutates_args=())
def aes_normal(derived: Tensor, numel: int, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`normals`, as one operation of a graph, which takes the derived key as a tensor, `uint8` of shape (32,)."""
    return normals(bytes(derived.tolist()), numel, start, stop, dtype, device)


@aes_normal.register_fake
def _(derived: Tensor, numel: int, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(stop - start, dtype=dtype, device=device)
