"""Draws for a `torch.utils.data.DataLoader`: which rows to load, and batches padded to a fixed shape.

The loader's workers load only the rows that were drawn, and need no key.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pegrad import trees
from pegrad._validate import check_integer, check_size
from pegrad.errors import ArgumentError
from pegrad.random.keys import check_key
from pegrad.sampling.draws import Draw, UserDraw

Rows = list[Any]  # int for each example; for each user a tuple of int
Collate = Callable[[list[Any]], Any]


class Batches(torch.utils.data.Sampler[Rows]):
    """The `batch_sampler` of a DataLoader whose batches are a sampler's draws. Made by `batches`."""

    def __init__(
        self,
        sampler: Callable[[Tensor, int], Draw | UserDraw],
        key: Tensor,
        start: int,
        stop: int,
        microbatch_size: int | None,
    ) -> None:
        rows: int = sampler.rows  # type: ignore[attr-defined]
        self._sampler, self._key, self._steps = sampler, key, range(start, stop)
        self._rows = rows if microbatch_size is None else min(microbatch_size, rows)
        self.per_step = -(-rows // self._rows)
        """How many micro-batches make up the batch of one step: the same for every step."""

    def __len__(self) -> int:
        """The number of batches that the loader gives: `per_step` for each step."""
        return len(self._steps) * self.per_step

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows of each micro-batch, without padding: those of one step after those of the one before."""
        for step in self._steps:
            drawn = _rows_of(self._sampler(self._key, step))
            for part in range(self.per_step):
                yield drawn[part * self._rows :][: self._rows]

    def collate(self, dataset: Dataset[Any], collate_fn: Collate = default_collate) -> Collate:
        """Make the DataLoader's `collate_fn`, which pads.

        Args:
            dataset: the data set that is loaded; its item 0 fills the padding, which the mask hides.
            collate_fn: makes a batch of a list of items: `default_collate`, or a data collator of transformers'. To
                keep shapes fixed along other axes too (tokens), let it pad to one length.

        Returns:
            A function of the items of a micro-batch that returns `(batch, mask)`: every leaf of `batch` with the same
            leading axis, `mask` `bool` of that length, True where the row is an example. For a `UserSampler`, `batch`
            is `(records, present)`, with leaves `(users, k, ...)` and `present` `bool` `(users, k)`.

        Raises:
            ArgumentError: at the first batch, if `collate_fn` returns another number of rows than it was given.
            LeafError: at the first batch, if a leaf is not a tensor.
        """
        return _Collate(self._rows, getattr(self._sampler, "max_records", None), dataset[0], collate_fn)

    def by_step(self, loader: Iterable[Any]) -> Iterator[tuple[int, Iterator[Any]]]:
        """Group what a DataLoader gives by the step that it belongs to.

        Args:
            loader: a DataLoader with this `batch_sampler`.

        Yields:
            `(step, parts)` for each step; `parts` gives its `per_step` micro-batches, each `(batch, mask)`. Parts that
            were not taken are skipped.
        """
        stream = iter(loader)
        for step in self._steps:
            parts = islice(stream, self.per_step)
            yield step, parts
            for _ in parts:
                pass


def batches(
    sampler: Callable[[Tensor, int], Draw | UserDraw],
    key: Tensor,
    *,
    start: int = 0,
    stop: int,
    microbatch_size: int | None = None,
) -> Batches:
    """Make the `batch_sampler` of a DataLoader from a sampler: its draws, padded to a fixed shape, with a mask.

    Guarantee:
        The batch of a step holds the rows that `sampler(key, step)` drew, each once, and padding that its mask hides;
        an empty draw is a batch of padding alone. It depends on the key and the step alone: not on `start`, the
        number of workers, or `microbatch_size`. What is pickled for a worker does not hold the key. Tests:
        `test_a_loader_gives_what_was_drawn`, `test_resuming_gives_the_same_batches`, `test_no_worker_gets_the_key`.

    Args:
        sampler: a sampler of `pegrad.sampling`.
        key: the sampler's key, `uint8` (32,), not used for anything else, and secret.
        start: the first step, at least 0. No step before it is drawn.
        stop: one after the last step, at least `start`.
        microbatch_size: rows of a micro-batch; None is all rows of a draw. Every step has ⌈rows / microbatch_size⌉
            micro-batches, however many examples were drawn, so that what the loader gives shows no sizes but in the
            masks; those at the end may be padding alone.

    Returns:
        A `Batches`.

    Raises:
        ArgumentError: an argument is out of range or no sampler.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from pegrad import random, sampling
        >>> dataset = TensorDataset(torch.randn(100, 3))
        >>> sampler = sampling.PoissonSampler(num_examples=100, sampling_rate=0.1, max_batch_size=40)
        >>> draws = sampling.batches(sampler, random.key(0), start=5, stop=8, microbatch_size=16)
        >>> loader = DataLoader(dataset, batch_sampler=draws, collate_fn=draws.collate(dataset))
        >>> for step, parts in draws.by_step(loader):
        ...     print(step, [tuple(batch[0].shape) for batch, mask in parts])
        5 [(16, 3), (16, 3), (16, 3)]
        6 [(16, 3), (16, 3), (16, 3)]
        7 [(16, 3), (16, 3), (16, 3)]
    """
    if not callable(sampler) or not hasattr(sampler, "rows"):
        raise ArgumentError(f"Expected sampler to be a sampler of pegrad.sampling, got {type(sampler).__name__}.")
    check_key(key)
    check_integer("start", start, 0)
    check_integer("stop", stop, start)
    check_size("microbatch_size", microbatch_size)
    return Batches(sampler, key, start, stop, microbatch_size)


class ByUser(Dataset[list[Any]]):
    """A data set whose index is a tuple of rows and whose item is the list of their items: the records of a user.

    A DataLoader over the draws of a `UserSampler` loads `ByUser(dataset)`; its collate function is made from `dataset`.

    Args:
        dataset: the data set of records, map-style.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: tuple[int, ...]) -> list[Any]:
        """Load a user's records."""
        many = getattr(self.dataset, "__getitems__", None)
        return list(many(list(rows))) if many else [self.dataset[row] for row in rows]


class _Collate:
    """Pads items to a fixed number, and collates. It goes to the workers, so it holds no sampler and no key."""

    def __init__(self, rows: int, records: int | None, filler: Any, collate_fn: Collate) -> None:
        self._rows, self._records, self._filler, self._collate_fn = rows, records, filler, collate_fn

    def __call__(self, items: list[Any]) -> tuple[Any, Tensor]:
        mask = _first(len(items), self._rows)
        if self._records is None:
            return self._collated(_padded(items, self._rows, self._filler)), mask
        k = self._records
        users = _padded(items, self._rows, [])
        present = torch.stack([_first(len(user), k) for user in users])
        flat = self._collated([record for user in users for record in _padded(user, k, self._filler)])
        leaves, spec = trees.flatten(flat)
        return (trees.unflatten(spec, [leaf.unflatten(0, (self._rows, k)) for leaf in leaves]), present), mask

    def _collated(self, items: list[Any]) -> Any:
        batch = self._collate_fn(items)
        rows = trees.flatten_batch(batch)[2]
        if rows != len(items):
            raise ArgumentError(
                f"collate_fn made {rows} rows of {len(items)} items: expected one row for each, on the leading axis."
            )
        return batch


def _rows_of(draw: Draw | UserDraw) -> Rows:
    """The rows to load: of each example one, of each user a tuple."""
    if isinstance(draw, Draw):
        rows: Rows = draw.indices[draw.mask].tolist()
        return rows
    users = zip(draw.indices[draw.mask], draw.records[draw.mask], strict=True)
    return [tuple(rows[present].tolist()) for rows, present in users]


def _padded(items: list[Any], count: int, filler: Any) -> list[Any]:
    return [*items, *[filler] * (count - len(items))]


def _first(count: int, length: int) -> Tensor:
    return torch.arange(length, device="cpu") < count
