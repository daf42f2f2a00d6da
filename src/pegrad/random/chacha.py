"""ChaCha20 in integer operations of torch: noise that is made where it is needed, and that a compiler can fuse.

Everything here is a pure function of tensors and of Python numbers: no value is read back, nothing is written in place,
no loop runs over data. So a tracer sees plain operations, of which the key's words are an input, and a compiler makes
one function of counter, rounds and Box–Muller. The state lies in four rows, of which half a round takes four words at
once: a quarter of the operations of one after the other. The price is that loops end where rows are rotated.

The rounds are some 600 operations, whatever is drawn, and cost a compiler much: Inductor takes half a minute for them
on a CPU. So a graph draws all that it needs at once, by `each_normal`.

Words are int32, whose sums must wrap around. On a CPU they do, eager and in Inductor's C++, in whole vectors and in
what is left over of them: the tests compare every word with another implementation's. C++ does not promise it, and
Triton, which does, has not been tried; the same tests would tell.

Source: Bernstein, "ChaCha, a variant of Salsa20", 2008, whose counter and nonce of 64 bits each are used: a stream has
2^64 blocks. RFC 8439 calls the upper half of the counter the first word of its nonce, so up to 2^32 blocks the two are
the same function.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pegrad.random.box_muller import Precision, box_muller, precision_of, uniform_of

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_WORDS = 16  # of a block
_DOUBLE_ROUNDS = 10

# How many numbers are made at once outside of graphs: as many as stay in cache on a CPU; on an accelerator so many that
# launching the operations costs little, at some 200 MB. No part of what a key means.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 16, 1 << 22


def at_once(device: torch.device) -> int:
    """How many numbers are to be made at once outside of graphs."""
    return _AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE


def key_words(derived: Tensor) -> Tensor:
    """Read derived keys, `uint8` of shape (..., 32), as the words of ChaCha20's, `int32` of shape (..., 8)."""
    first, second, third, last = derived.to(torch.int32).unflatten(-1, (8, 4)).unbind(-1)
    return first | _shifted(second, 8) | _shifted(third, 16) | _shifted(last, 24)


def keystream(words: Tensor, counter: Tensor, nonce: tuple[int, int] = (0, 0)) -> Tensor:
    """Make blocks of the keystream.

    Args:
        words: the key, int32 of shape (8,), or of shape (n, 8), a key for each block.
        counter: the number of each block, at least 0, int64 of shape (n,).
        nonce: two words, from -2^31 to 2^31 - 1. A key that is derived for one stream needs no other than 0.

    Returns:
        int32 of shape (16, n): the words of block number `counter[i]` in column i.

    Guarantee: the function of RFC 8439, section 2.3. No two blocks of a key and a nonce have the same counter, so no
    part of the stream comes twice. Tests: `test_blocks_of_the_rfc`, `test_keystream_of_random_keys`,
    `test_the_counter_carries`.
    """
    low = (((counter & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
    high = (counter >> 32).to(torch.int32)
    fixed = torch.stack([torch.full_like(low, word) for word in _CONSTANTS])
    upper, lower = words.reshape(-1, 8).t().expand(8, len(counter)).unflatten(0, (2, 4))
    last = torch.stack([low, high, *(torch.full_like(low, word) for word in nonce)])
    a, b, c, d = fixed, upper, lower, last
    for _ in range(_DOUBLE_ROUNDS):
        a, b, c, d = _quarter_rounds(a, b, c, d)  # the columns of the state
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))  # its diagonals
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat([a + fixed, b + upper, c + lower, d + last])


def normals(words: Tensor, numel: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw standard normals number `start`, ..., `start + numel - 1` of a stream.

    Each number depends on its place in the stream alone: ten (float64: eight) are made of each block.

    Args:
        words: the key's, of `key_words`, derived for this one stream; the device is theirs.
        numel: how many numbers, at least 0.
        start: the first, at least 0.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        A tensor of shape (numel,).

    Guarantee: see `pegrad.random.normal`. Tests: `test_normal_follows_the_law`, `test_a_slice_is_that_of_the_whole`.
    """
    return each_normal(words[None], [(start, start + numel)], dtype)[0]


def each_normal(words: Tensor, spans: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Draw from several streams at once, in no more operations than from one.

    Args:
        words: the keys', of `key_words`, int32 of shape (streams, 8); see `normals`.
        spans: for each stream, which numbers are wanted: the first, and one after the last.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        For each stream what `normals` returns, bit for bit.
    """
    precision = precision_of(dtype)
    return _each(words, spans, 2 * _pairs(precision), lambda blocks: _normals_of(blocks, precision), dtype)


def uniforms(words: Tensor, numel: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw uniforms in (0, 1] of a stream; arguments and result are those of `normals`, the law of `random.uniform`."""
    precision = precision_of(dtype)
    of_a_block = _WORDS * torch.int32.itemsize // precision.word.itemsize
    spans = [(start, start + numel)]
    return _each(words[None], spans, of_a_block, lambda blocks: _uniforms_of(blocks, precision), dtype)[0]


def _each(
    words: Tensor,
    spans: Sequence[tuple[int, int]],
    of_a_block: int,
    numbers_of: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Make the blocks that the spans lie in, those of all streams side by side, and cut the spans out."""
    firsts = [start // of_a_block for start, _ in spans]
    counts = [-(-stop // of_a_block) - first for (_, stop), first in zip(spans, firsts, strict=True)]
    place = torch.arange(sum(counts), device=words.device)
    if len(spans) == 1:
        blocks = keystream(words, place + firsts[0])
    else:
        ends = list(accumulate(counts))
        skipped = [first - (end - count) for first, end, count in zip(firsts, ends, counts, strict=True)]
        stream = torch.bucketize(place, torch.tensor(ends, device=words.device), right=True)
        counter = place + torch.tensor(skipped, device=words.device).index_select(0, stream)
        blocks = keystream(words.index_select(0, stream), counter)
    pieces = numbers_of(blocks).to(dtype).flatten().split([count * of_a_block for count in counts])
    return [
        piece[start - first * of_a_block : stop - first * of_a_block]
        for piece, (start, stop), first in zip(pieces, spans, firsts, strict=True)
    ]


def _pairs(precision: Precision) -> int:
    """How many pairs of normals a block makes: each has two words for a radius, and one or two for an angle."""
    return _WORDS // (2 + precision.word.itemsize // torch.int32.itemsize)


def _normals_of(blocks: Tensor, precision: Precision) -> Tensor:
    """Make of each block first all r·cos θ, then all r·sin θ: from (16, n) to (n, 2 pairs)."""
    of_a_pair = _WORDS // _pairs(precision)
    drawn = blocks[: of_a_pair * _pairs(precision)].unflatten(0, (-1, of_a_pair))
    radius, angle = _wide(drawn[:, 0], drawn[:, 1]), drawn[:, 2]
    if precision.word is torch.int64:
        angle = _wide(angle, drawn[:, 3])
    return torch.cat(box_muller(radius, angle, precision)).t()


def _uniforms_of(blocks: Tensor, precision: Precision) -> Tensor:
    wide = precision.word is torch.int64
    return uniform_of(_wide(blocks[0::2], blocks[1::2]) if wide else blocks, precision).t()


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RFC 8439, section 2.1, on four quarters of the state at once, one a row."""
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


def _rotated(word: Tensor, bits: int) -> Tensor:
    """Rotate to the left. A right shift of int32 repeats the sign, which the mask takes away."""
    return _shifted(word, bits) | (torch.bitwise_right_shift(word, 32 - bits) & ((1 << bits) - 1))


def _shifted(word: Tensor, bits: int) -> Tensor:
    return torch.bitwise_left_shift(word, bits)


def _wide(low: Tensor, high: Tensor) -> Tensor:
    """Put two words of 32 bits together to one of 64."""
    return torch.bitwise_left_shift(high.long(), 32) | (low.long() & 0xFFFFFFFF)
