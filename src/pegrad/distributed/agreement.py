"""What the ranks of a step must have in common, checked by one small exchange before any sum leaves a rank."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pegrad import trees
from pegrad.distributed.groups import Group
from pegrad.distributed.shares import Share
from pegrad.errors import PegradError


class AgreementError(PegradError, RuntimeError):
    """The ranks of a step do not agree on what it is, or one of them cannot take it; every rank raises this."""


class Agreement:
    """One exchange in a step, in which all ranks come to agree, or all raise.

    Args:
        group: the ranks; alone, only the shares are checked.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sought = False

    def reach(self, common: Mapping[str, Any], shares: Sequence[Share] = ()) -> None:
        """Check that all ranks take the same step, and that their shares are the draw: each part once.

        Guarantee: where it returns on one rank it returns on all, and then `common` is the same everywhere, but for
        what a hash of 63 bits may miss, and the shares are all of one draw, every one of it on exactly one rank. Bound
        to `test_what_the_ranks_must_have_in_common_is_checked`.

        Args:
            common: by name, what must be the same: numbers, names, keys, pytrees of tensors.
            shares: this rank's; none where the ranks share no draw.

        Raises:
            AgreementError: on every rank.
        """
        draws, numbers = {share.draw for share in shares}, [share.number for share in shares]
        total, first = max((share.total for share in shares), default=0), min(numbers, default=0)
        in_a_row = len(draws) <= 1 and sorted(numbers) == list(range(first, first + len(numbers)))
        entries = {**common, "draw": (sorted(draws), total)}
        heard = self._exchange([1, in_a_row, first, len(numbers), *map(_hash, entries.values())])
        failed = [str(rank) for rank, (fine, *_) in enumerate(heard) if not fine]
        if failed:
            raise AgreementError(f"Rank {', '.join(failed)} failed, and says why: nothing was released")
        for rank, other in enumerate(heard):
            for name, ours, theirs in zip(entries, heard[0][4:], other[4:], strict=False):
                if ours != theirs:
                    raise AgreementError(f"Ranks 0 and {rank} do not have the same {name}: nothing was released")
        ends = [0]
        for _, whole, start, count, *_ in sorted(heard, key=lambda other: other[2]):
            ends.append(start + count if whole and start == ends[-1] else -1)
        if ends[-1] != total or -1 in ends:
            raise AgreementError(
                "The shares of all ranks are not the draw, every micro-batch once: give the step on each rank all the "
                "shares that split(draw, mesh) returned there, and no others; nothing was released"
            )

    @contextmanager
    def or_none(self) -> Iterator[None]:
        """Where this rank fails before it has sought agreement, let the others know: they would wait."""
        try:
            yield
        except Exception:
            if not self._sought:
                self._exchange([])
            raise

    def _exchange(self, told: list[int]) -> list[list[int]]:
        self._sought = True
        message = torch.tensor([*told, *[0] * (_ROOM - len(told))], dtype=torch.int64, device=self._group.device)
        return [other.tolist() for other in self._group.all(message)]


_ROOM = 24  # numbers of a message: those of one that fails are zeros


def _hash(entry: Any) -> int:
    """Hash what a rank must have in common with the others, to 63 bits."""
    look = hashlib.blake2b(digest_size=8, person=b"pegrad agree")
    for path, leaf in zip(trees.paths(entry), trees.leaves(entry), strict=True):
        look.update(f"{path} {_look(leaf)}\n".encode())
    return int.from_bytes(look.digest(), "little") >> 1


def _look(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))  # functions print where they lie, which is no two ranks' own
    if isinstance(leaf, DTensor):
        return f"{leaf.dtype} {tuple(leaf.shape)} {leaf.placements}"  # each rank has a part of its own
    return f"{leaf.dtype} {tuple(leaf.shape)} {_fingerprint(leaf.detach())}"


def _fingerprint(leaf: Tensor) -> list[int]:
    """Tell a tensor's bits by a few numbers, on its device and at about the speed of its memory.

    A word, with its upper half added so that changes of topmost bits, signs for one, do not make up for each other,
    counts times an odd number of its place, modulo 2^64.
    """
    flat = leaf.contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()
    rest = flat.numel() * flat.element_size() % _WORD // flat.element_size()
    words = flat[: flat.numel() - rest].view(torch.int64)
    block = min(len(words), _CACHED if flat.device.type == "cpu" else _MANY)
    places = (2 * torch.arange(block, device=flat.device) + 1) * _ODD
    mixed = torch.empty_like(places)
    found = torch.zeros((), dtype=torch.int64, device=flat.device)
    for some in words.split(block) if block else ():
        here = mixed[: len(some)]
        torch.bitwise_right_shift(some, 32, out=here).add_(some).mul_(places[: len(some)])
        found = found * _ODD + here.sum()
    return [int(found), *flat[flat.numel() - rest :].view(torch.uint8).tolist()]


_CACHED, _MANY = 1 << 15, 1 << 22
_WORD = 8  # bytes
_ODD = -7046029254386353131  # 2^64 over the golden ratio, an odd number whose bits are well mixed
