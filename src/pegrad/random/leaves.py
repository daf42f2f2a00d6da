"""The noise of a pytree's leaves: each leaf has a key of its own, and ChaCha20 draws many leaves together.

In a graph, a key must be an input: one that is a constant of it repeats its noise at every run. So what derives keys
refuses to be traced. Derive outside, by `leaf_keys`, and draw inside, by `each_normal_from`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.errors import ArgumentError, LeafError
from pegrad.random import aes, chacha
from pegrad.random.box_muller import PRECISION
from pegrad.random.ciphers import NORMAL, Cipher, chosen
from pegrad.random.draws import checked_part, normal_slice_from
from pegrad.random.keys import KEY_BYTES, derive_for_each, refuse_constant
from pegrad.torch_internals import without_subclasses


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
    return _rows(_derived(key, _looks(tree, (), cipher)))


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

    Small leaves are drawn together.

    Args:
        key: see `tree_normal`.
        tree: see `tree_normal`.
        parts: for each leaf, which part of a larger one it is, whose noise is wanted; None or missing: it is whole.
        cipher: see `tree_normal`.
    """
    looks = _looks(tree, parts, cipher)  # holds no leaf
    derived = _derived(key, looks)

    def drawn() -> Iterator[Tensor]:
        groups = {group[0]: group for group in _groups(looks, _at_once)}
        waiting: dict[int, Tensor] = {}
        for index, look in enumerate(looks):
            group = groups.get(index, ())
            if len(group) > 1:
                some = _drawn_together(_rows([derived[i] for i in group]).unbind(), [looks[i] for i in group])
                waiting.update(zip(group, (noise.clone() for noise in some), strict=True))  # no view of the others
            yield (
                waiting.pop(index)
                if index in waiting
                else normal_slice_from(derived[index], *look.part, look.dtype, look.device, look.cipher)
            ).view(look.shape)

    return drawn()


def each_normal_from(
    derived: Tensor, tree: trees.PyTree, parts: Sequence[Part | None] = (), *, cipher: Cipher | None = None
) -> list[Tensor]:
    """Draw as `each_normal`, from keys that are derived already: for a graph, which takes the derived keys as an input.

    By ChaCha20 the graph is of plain operations: all leaves of one device and dtype are drawn together, in hardly more
    operations than one, at some 50 bytes of memory for each number. By AES it has one for each large leaf,
    `pegrad::aes_normal`, and `pegrad::each_aes_normal` for several small ones.

    Args:
        derived: what `leaf_keys` returns, `uint8` of shape (leaves, 32), on any device.
        tree: see `tree_normal`.
        parts: see `each_normal`.
        cipher: see `tree_normal`; that which `leaf_keys` was given.

    Returns:
        The noise of each leaf, as `each_normal` draws it: row i of `leaf_keys(key, ...)` is for
        `normal_slice(fold_in(key, i), ...)`. Bit for bit, unless a compiler has other `log`, `cos` and `sin`. Test:
        `test_a_traced_draw_is_the_eager_one`.

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
    with without_subclasses():  # what comes of a `Key` is a plain tensor, as tracers want them
        rows = derived.unbind()
    drawn: dict[int, Tensor] = {}
    for group in _groups(looks, _at_once_in_a_graph):
        some = _drawn_together([rows[index] for index in group], [looks[index] for index in group])
        drawn.update(zip(group, some, strict=True))
    return [drawn[index] for index in range(len(looks))]


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
            Part(*checked_part(*(part or (leaf.numel(), 0, leaf.numel())))),
            chosen(cipher, leaf.device),
        )
        for leaf, part in zip_longest(leaves, parts)
    ]


def _at_once(look: _Look) -> float:
    """How many numbers are drawn together, outside of graphs."""
    return aes.TOGETHER if look.cipher is Cipher.AES else chacha.at_once(look.device)


def _at_once_in_a_graph(look: _Look) -> float:
    """How many numbers one operation draws, or by ChaCha20 some 600 of them."""
    return aes.TOGETHER if look.cipher is Cipher.AES else math.inf


def _groups(looks: Sequence[_Look], at_once: Callable[[_Look], float]) -> list[list[int]]:
    """Tell which leaves, by their numbers, are drawn together: of one kind, and no more than so many numbers."""
    groups: list[list[int]] = []
    last: dict[tuple, tuple[list[int], int]] = {}  # of each kind the last group, and how many numbers that has
    for index, look in enumerate(looks):
        # AES is entered at the beginning of what it makes.
        size = look.part.numel if look.cipher is Cipher.AES else look.part.stop - look.part.start
        group, before = last.get(_kind(look), ([], 0))
        if not group or before + size > at_once(look):
            group, before = [], 0
            groups.append(group)
        group.append(index)
        if size <= at_once(look):  # what is larger interrupts nothing
            last[_kind(look)] = group, before + size
    return groups


def _drawn_together(derived: Sequence[Tensor], looks: Sequence[_Look]) -> list[Tensor]:
    """Draw leaves of one kind from their derived keys, `uint8` of shape (32,) each."""
    device, cipher, dtype = _kind(looks[0])
    spans = [(look.part.start, look.part.stop) for look in looks]
    if cipher is Cipher.CHACHA20:
        drawn = chacha.each_normal(chacha.key_words(torch.stack([*derived]).to(device)), spans, dtype)
    elif len(looks) == 1:
        drawn = [aes.aes_normal(derived[0], *looks[0].part, dtype, device)]
    else:
        numels = [look.part.numel for look in looks]
        whole = aes.each_aes_normal(torch.stack([*derived]), numels, dtype, device)
        drawn = [leaf[slice(*span)] for leaf, span in zip(whole, spans, strict=True)]
    return [noise.view(look.shape) for noise, look in zip(drawn, looks, strict=True)]


def _kind(look: _Look) -> tuple[torch.device, Cipher, torch.dtype]:
    """What leaves that are drawn together have in common."""
    return look.device, look.cipher, look.dtype


def _derived(key: Tensor, looks: Iterable[_Look]) -> list[bytes]:
    """Derive what each leaf is drawn from."""
    return derive_for_each(key, enumerate(NORMAL[look.cipher] for look in looks))


def _rows(derived: Sequence[bytes]) -> Tensor:
    """Make a tensor of derived keys, `uint8` of shape (leaves, 32)."""
    return torch.tensor([*map(list, derived)], dtype=torch.uint8, device="cpu").view(-1, KEY_BYTES)
