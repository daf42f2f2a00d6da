"""The noise of a pytree's leaves: each leaf has a key of its own, and ChaCha20 draws many leaves together.

In a graph, a key must be an input: one that is a constant of it repeats its noise at every run. So what derives keys
refuses to be traced. Derive outside, by `leaf_keys`, and draw inside, by `each_normal_from`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad import trees
from pegrad.errors import ArgumentError, LeafError
from pegrad.random import aes, chacha
from pegrad.random.box_muller import PRECISION
from pegrad.random.ciphers import NORMAL, Cipher, chosen
from pegrad.random.draws import checked_part, normal_slice
from pegrad.random.keys import KEY_BYTES, check_key, derive_for, fold_in, refuse_constant
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

    By ChaCha20 the graph is of plain operations: all leaves of one device and dtype are drawn together, in hardly more
    operations than one, at some 50 bytes of memory for each number. By AES it has one for each leaf,
    `pegrad::aes_normal`.

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
    return _drawn_together(derived, looks)


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


def _groups(looks: Sequence[_Look]) -> Iterator[list[int]]:
    """Cut the leaves' numbers, in order, into runs that are drawn together: a single one, or several by ChaCha20."""
    run: list[int] = []
    for index, look in enumerate(looks):
        last = looks[run[-1]] if run else look
        size = sum(looks[each].part.stop - looks[each].part.start for each in [*run, index])
        fits = look.cipher is Cipher.CHACHA20 and _kind(look) == _kind(last) and size <= chacha.at_once(look.device)
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


def _rows(key: Tensor, looks: Iterable[tuple[int, _Look]]) -> Tensor:
    """Derive what leaves of the given numbers are drawn from: `uint8` of shape (leaves, 32)."""
    derived = b"".join(derive_for(fold_in(key, index), NORMAL[look.cipher]) for index, look in looks)
    return torch.tensor(list(derived), dtype=torch.uint8, device="cpu").view(-1, KEY_BYTES)
