"""Stateless random numbers for privacy: 256-bit keys, a cipher's keystream, Box–Muller normals.

A key (`pegrad.keys`) is a `torch.uint8` tensor of shape (32,) that prints as `key(…)`, so a training state that carries
one is tensors and numbers. A key is for one use: derive a fresh one for each with `fold_in` or `split`. Derivation is
BLAKE2b keyed with the parent and personalised by purpose, so no two purposes ever meet in one derived key. Numbers come
from the keystream of a cipher under a derived key; torch does the arithmetic.

What must stay secret, for as long as what was made with it is to stay private: every key, the seed that a key was made
from, and whatever a key is derived from. Whoever has the key of a run can make its noise again and subtract it. A key
lies in the state of a run, so a checkpoint that is published must be one without the state.

There are two ciphers, and a key gives other numbers by each; a `Cipher` chooses, and by default the device does.
AES-256 in counter mode, for the CPU: a processor has instructions for it. Asked for on an accelerator, its keystream is
made on the CPU and copied block by block. ChaCha20, for accelerators: it is plain integer arithmetic, runs where the
noise is needed, copies nothing but the key, and compiles.

ChaCha20 has been measured on a CPU alone, where AES is the faster: some ten times, operation by operation, and several
times over many numbers when compiled (`benchmarks/noise.py`). On a GPU it is expected to be bound by the launches of
its some 600 kernels where there are few numbers, and by memory where there are many; compiled, by memory, in twenty
or so, since compilers do not fuse over the rotations of the state. None of that has been measured.

Under either, the bits are the same on every device; the floating-point results may differ in the last places, as each
device, and each compiler, has its own `log`, `cos` and `sin`. What Inductor compiles for a CPU has the same words, and
normals within four units of 2^-23 (float64: 2^-52) of their size (`test_compiled_words_are_the_eager_ones`).

In a graph, a key must be an input: one that is a constant of it repeats its noise at every run. So what derives keys
refuses to be traced. Derive outside, by `leaf_keys`, and draw inside, by `normal_from` and `each_normal_from`.

Not guaranteed: a float is a rounded real, so the low bits of a noisy value can betray what the noise was
added to (Mironov, "On significance of the least significant bits for differential privacy", CCS 2012); the
time that a call takes is not hidden; keys lie in ordinary memory and are not wiped.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import aes, chacha, trees
from pegrad.box_muller import PRECISION, precision_of, uniform_of
from pegrad.errors import ArgumentError, LeafError
from pegrad.keys import (
    KEY_BYTES,
    Key,
    check_key,
    derive,
    fold_in,
    key,
    key_bytes,
    natural,
    refuse_constant,
    split,
)
from pegrad.torch_internals import without_subclasses

__all__ = [
    "Cipher",
    "Key",
    "Part",
    "check_key",
    "each_normal",
    "each_normal_from",
    "fold_in",
    "key",
    "leaf_keys",
    "normal",
    "normal_from",
    "normal_slice",
    "permutation",
    "split",
    "torch_generators",
    "tree_normal",
    "uniform",
]


class Cipher(Enum):
    """What makes a keystream of a derived key."""

    AES = "AES-256-CTR"
    """On the CPU, by its own instructions."""
    CHACHA20 = "ChaCha20"
    """On any device, by integer operations of torch: see `pegrad.chacha`."""


# Personalisations of BLAKE2b: no two purposes, and no two ciphers, share a derived key.
_NORMAL = {Cipher.AES: b"pegrad normal", Cipher.CHACHA20: b"chacha20 normal"}
_UNIFORM = {Cipher.AES: b"pegrad uniform", Cipher.CHACHA20: b"chacha20 uniform"}

# How many numbers ChaCha20 makes at once outside of graphs: as many as stay in cache on a CPU; on an accelerator so
# many that launching the operations costs little, at some 200 MB. No part of what a key means.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 16, 1 << 22


class Part(NamedTuple):
    """A part of a flat tensor."""

    numel: int
    """Of the whole."""
    start: int
    stop: int


class _Look(NamedTuple):
    """What is to be drawn for a leaf."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    part: Part
    cipher: Cipher


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
    cipher = _chosen(cipher, device)
    derived = _derived(key, _UNIFORM[cipher])
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
        >>> normal(key(0), (2, 3)).shape
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
    numel, start, stop = _checked(Part(numel, start, stop))
    device = torch.empty(0, device=device).device
    cipher = _chosen(cipher, device)
    derived = _derived(key, _NORMAL[cipher])
    if cipher is Cipher.AES:
        return aes.normals(derived, numel, start, stop, dtype, device)
    words, at_once = _words(derived, device), _at_once(device)
    if stop - start <= at_once:
        return chacha.normals(words, stop - start, start, dtype)
    out = torch.empty(stop - start, dtype=dtype, device=device)
    for begin in range(start, stop, at_once):
        count = min(at_once, stop - begin)
        out[begin - start :][:count] = chacha.normals(words, count, begin, dtype)
    return out


def normal_from(
    derived: Tensor,
    numel: int,
    start: int,
    stop: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cipher: Cipher | None = None,
) -> Tensor:
    """Draw as `normal_slice`, from a key that is derived already: for a graph, which takes the derived key as an input.

    By ChaCha20 the graph is of plain operations; by AES it has one, `pegrad::aes_normal`.

    Args:
        derived: a row of `leaf_keys`, `uint8` of shape (32,), on any device.
        numel: see `normal_slice`.
        start: see `normal_slice`.
        stop: see `normal_slice`.
        dtype: see `normal_slice`.
        device: see `normal_slice`.
        cipher: see `normal`; that for which the key was derived.

    Returns:
        What `normal_slice` returns: row i of `leaf_keys(key, ...)` is for `normal_slice(fold_in(key, i), ...)`. Bit for
        bit, unless a compiler has other `log`, `cos` and `sin`. Test: `test_a_traced_draw_is_the_eager_one`.

    Raises:
        ArgumentError: as `normal_slice`, or a graph is being traced of which the key would be a constant.
    """
    precision_of(dtype)
    device = torch.empty(0, device=device).device
    part = _checked(Part(numel, start, stop))
    look = _Look(torch.Size([part.stop - part.start]), dtype, device, part, _chosen(cipher, device))
    check_key(derived)
    refuse_constant(derived)
    return _drawn_together(derived[None], [look])[0]


def leaf_keys(key: Tensor, tree: trees.PyTree, *, cipher: Cipher | None = None) -> Tensor:
    """Derive what `tree_normal` draws each leaf from.

    Args:
        key: the key, `uint8` of shape (32,).
        tree: a pytree of floating-point tensors; only devices and their number are read.
        cipher: see `tree_normal`.

    Returns:
        `uint8` of shape (leaves, 32), on the CPU: secret, and for one draw, like the key itself. It is a plain tensor,
        as compilers want their inputs, so it prints: keep it out of logs.

    Raises:
        ArgumentError: `key` is not a key, the cipher is none of the two, or a graph is being traced.
        LeafError: a leaf is not a tensor of float64, float32, bfloat16 or float16.
    """
    looks = _looks(tree, (), cipher)
    return _rows(key, enumerate(looks))


def tree_normal(key: Tensor, tree: trees.PyTree, *, cipher: Cipher | None = None) -> trees.PyTree:
    """Draw independent standard normals in the shape of a pytree.

    Guarantee:
        No two leaves share a stream: leaf number i draws from `fold_in(key, i)`. Test:
        `test_no_value_is_shared`.

    Args:
        key: the key, `uint8` of shape (32,).
        tree: a pytree of floating-point tensors; only shapes, dtypes and devices are read.
        cipher: None is AES for leaves on the CPU and ChaCha20 for those on accelerators.

    Returns:
        A pytree of the same structure, each leaf with the shape, dtype and device of its model.

    Raises:
        ArgumentError: `key` is not a key, the cipher is none of the two, or a graph is being traced.
        LeafError: a leaf is not a tensor of float64, float32, bfloat16 or float16.
    """
    return trees.unflatten(trees.flatten(tree)[1], list(each_normal(key, tree, cipher=cipher)))


def each_normal(
    key: Tensor, tree: trees.PyTree, parts: Sequence[Part | None] = (), *, cipher: Cipher | None = None
) -> Iterator[Tensor]:
    """Draw the leaves of `tree_normal` one by one, each when it is asked for; arguments and errors are the same.

    By ChaCha20 small leaves in a row are drawn together.

    Args:
        key: see `tree_normal`.
        tree: see `tree_normal`.
        parts: for each leaf, which part of a larger one it is, whose noise is wanted; None or missing: it is whole.
        cipher: see `tree_normal`.
    """
    looks = _looks(tree, parts, cipher)  # holds no leaf
    check_key(key)

    def drawn() -> Iterator[Tensor]:
        for group in _groups(looks):
            if len(group) > 1:
                some = [looks[index] for index in group]
                for noise in _drawn_together(_rows(key, zip(group, some, strict=True)), some):
                    yield noise.clone()  # not a view that keeps the others
                continue
            index = group[0]
            (shape, dtype, device, (numel, start, stop), cipher) = looks[index]
            yield normal_slice(fold_in(key, index), numel, start, stop, dtype=dtype, device=device, cipher=cipher).view(
                shape
            )

    return drawn()


def each_normal_from(
    derived: Tensor, tree: trees.PyTree, parts: Sequence[Part | None] = (), *, cipher: Cipher | None = None
) -> list[Tensor]:
    """Draw as `each_normal`, from keys that are derived already: for a graph, which takes the derived keys as an input.

    By ChaCha20 all leaves of one device and dtype are drawn together, in hardly more operations than one, at some 50
    bytes of memory for each number.

    Args:
        derived: what `leaf_keys` returns, `uint8` of shape (leaves, 32), on any device.
        tree: see `tree_normal`.
        parts: see `each_normal`.
        cipher: see `tree_normal`; that which `leaf_keys` was given.

    Returns:
        The noise of each leaf, as `each_normal` draws it; see `normal_from`.

    Raises:
        ArgumentError: `derived` is not what `leaf_keys` returns, a part does not lie within its whole, the cipher is
            none of the two, or a graph is being traced of which the keys would be constants.
        LeafError: a leaf is not a tensor of float64, float32, bfloat16 or float16.
    """
    looks = _looks(tree, parts, cipher)
    if not isinstance(derived, Tensor) or derived.dtype != torch.uint8 or derived.shape != (len(looks), KEY_BYTES):
        raise ArgumentError(
            f"Expected derived to be what leaf_keys returns, torch.uint8 of shape ({len(looks)}, {KEY_BYTES}), got "
            + (
                f"{derived.dtype} of shape {tuple(derived.shape)}."
                if isinstance(derived, Tensor)
                else f"{type(derived).__name__}."
            )
        )
    refuse_constant(derived)
    return _drawn_together(derived, looks)


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
    stream = aes.keystream(_derived(key, b"pegrad permute"))
    words = aes.words(stream, natural("n", n), torch.int64, torch.device("cpu"))
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


def _looks(tree: trees.PyTree, parts: Sequence[Part | None], cipher: Cipher | None) -> list[_Look]:
    """Note what is to be drawn for each leaf of a tree, having checked it."""
    leaves = trees.leaves(tree)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.dtype not in PRECISION:
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise LeafError(f"Expected a floating-point tensor at leaf {trees.path(tree, index)}, got {kind}.")
    return [
        _Look(
            leaf.shape,
            leaf.dtype,
            leaf.device,
            _checked(part or Part(leaf.numel(), 0, leaf.numel())),
            _chosen(cipher, leaf.device),
        )
        for leaf, part in zip_longest(leaves, parts)
    ]


def _groups(looks: Sequence[_Look]) -> Iterator[list[int]]:
    """Cut the leaves' numbers, in order, into runs that are drawn together: a single one, or several by ChaCha20."""
    run: list[int] = []
    for index, look in enumerate(looks):
        last = looks[run[-1]] if run else look
        size = sum(looks[each].part.stop - looks[each].part.start for each in [*run, index])
        fits = look.cipher is Cipher.CHACHA20 and _kind(look) == _kind(last) and size <= _at_once(look.device)
        if run and not fits:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _drawn_together(derived: Tensor, looks: Sequence[_Look]) -> list[Tensor]:
    """Draw leaves from their derived keys, one a row: by ChaCha20 all of one kind at once."""
    with without_subclasses():  # what comes of a `Key` is a plain tensor, as tracers want them
        rows = derived.unbind()
    drawn: dict[int, Tensor] = {}
    kinds: dict[tuple, list[int]] = {}
    for index, look in enumerate(looks):
        if look.cipher is Cipher.AES:
            drawn[index] = aes.aes_normal(rows[index], *look.part, look.dtype, look.device)
        else:
            kinds.setdefault(_kind(look), []).append(index)
    for (device, _, _), indices in kinds.items():
        words = chacha.key_words(torch.stack([rows[index] for index in indices]).to(device))
        spans = [(looks[index].part.start, looks[index].part.stop) for index in indices]
        drawn.update(zip(indices, chacha.each_normal(words, spans, looks[indices[0]].dtype), strict=True))
    return [drawn[index].view(look.shape) for index, look in enumerate(looks)]


def _kind(look: _Look) -> tuple[torch.device, Cipher, torch.dtype]:
    """What leaves that are drawn together have in common."""
    return look.device, look.cipher, look.dtype


def _derived(key: Tensor, purpose: bytes) -> bytes:
    return derive(key_bytes(key), purpose, 0)


def _rows(key: Tensor, looks: Iterable[tuple[int, _Look]]) -> Tensor:
    """Derive what leaves of the given numbers are drawn from: `uint8` of shape (leaves, 32)."""
    derived = b"".join(_derived(fold_in(key, index), _NORMAL[look.cipher]) for index, look in looks)
    return torch.tensor(list(derived), dtype=torch.uint8, device="cpu").view(-1, KEY_BYTES)


def _words(derived: bytes, device: torch.device) -> Tensor:
    return chacha.key_words(torch.tensor(list(derived), dtype=torch.uint8, device=device))


def _at_once(device: torch.device) -> int:
    return _AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE


def _chosen(cipher: Cipher | None, device: torch.device) -> Cipher:
    """Return the cipher that is asked for, or that of the device."""
    if cipher is None:
        return Cipher.AES if device.type in ("cpu", "meta") else Cipher.CHACHA20
    if not isinstance(cipher, Cipher):
        raise ArgumentError(f"Expected cipher to be a pegrad.random.Cipher or None, got {type(cipher).__name__}.")
    return cipher


def _checked(part: Part) -> Part:
    numel, start, stop = (natural(name, getattr(part, name)) for name in Part._fields)
    if not start <= stop <= numel:
        raise ArgumentError(f"Expected start <= stop <= numel, got start={start}, stop={stop}, numel={numel}.")
    return Part(numel, start, stop)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        raise ArgumentError(f"Expected shape to be a sequence of integers, got {type(shape).__name__}.")
    return tuple(natural("shape", size) for size in shape)
