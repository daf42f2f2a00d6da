"""Draws through a DataLoader: the same rows, whatever the workers, the micro-batches and the step to begin with."""

import pickle
from collections import UserDict

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import pegrad
from pegrad import random
from pegrad.errors import ArgumentError, LeafError
from pegrad.sampling import (
    BallsInBinsSampler,
    ByUser,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    ShuffledSampler,
    UserSampler,
    batches,
    gather,
)

N = 50
DATASET = TensorDataset(torch.arange(3 * N, dtype=torch.float32).view(N, 3), torch.arange(N))
SAMPLERS = [
    PoissonSampler(N, 0.1),
    PoissonSampler(N, 0.02),
    CyclicPoissonSampler(N, 0.5, 4),
    BallsInBinsSampler(N, 6),
    FixedSizeSampler(N, 12),
    ShuffledSampler(N, 12),
]


def _load(draws, dataset=DATASET, **options):
    return DataLoader(dataset, batch_sampler=draws, collate_fn=draws.collate(dataset), **options)


@pytest.mark.parametrize("microbatch_size", [None, 1, 5, 12, 10**6])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_loader_gives_what_was_drawn(sampler, microbatch_size):
    """Catches: a row lost or twice at the end of a micro-batch, padding that counts, a shape that changes."""
    draws = batches(sampler, random.key(0), stop=6, microbatch_size=microbatch_size)
    loader, size = _load(draws), min(microbatch_size or sampler.rows, sampler.rows)
    assert len(loader) == 6 * draws.per_step
    steps = []
    for step, parts in draws.by_step(loader):
        rows = []
        for (x, label), mask in parts:
            assert x.shape == (size, 3)
            assert mask.shape == label.shape == (size,)
            assert torch.equal(x[:, 0].long(), 3 * label)
            assert not label[~mask].any()
            rows += label[mask].tolist()
        draw = sampler(random.key(0), step)
        assert rows == draw.indices[draw.mask].tolist()
        steps.append(step)
    assert steps == list(range(6))


def test_a_batch_is_what_gather_gives():
    """Catches: padding that is not gather's, for which a program would have to tell the two apart."""
    sampler = PoissonSampler(N, 0.1)
    draws = batches(sampler, random.key(1), start=3, stop=4)
    (batch, mask), draw = next(iter(_load(draws))), sampler(random.key(1), 3)
    assert torch.equal(mask, draw.mask)
    for loaded, gathered in zip(batch, gather(DATASET.tensors, draw), strict=True):
        assert torch.equal(loaded, gathered)


def test_empty_draws_are_batches_too():
    """Catches: a step that is left out, which would tell that nobody was drawn, and break the count of the steps."""
    sampler = PoissonSampler(N, 1e-9, 4)
    for dataset in (DATASET, Subset(DATASET, range(N))):
        given = list(_load(batches(sampler, random.key(0), stop=3), dataset))
        assert len(given) == 3
        for (x, _), mask in given:
            assert x.shape == (4, 3)
            assert not mask.any()


def test_resuming_gives_the_same_batches():
    """Catches: a step that counts from the start of the loader."""
    sampler = PoissonSampler(N, 0.3)

    def labels(start):
        draws = batches(sampler, random.key(2), start=start, stop=9, microbatch_size=7)
        return {step: [label.tolist() for (_, label), _ in parts] for step, parts in draws.by_step(_load(draws))}

    whole = labels(0)
    assert labels(6) == {step: whole[step] for step in (6, 7, 8)}
    assert len({str(rows) for rows in whole.values()}) == 9


def test_resuming_draws_no_step_before():
    """Catches: replaying the run to get to its step."""
    asked = []

    class Recorder(PoissonSampler):
        def __call__(self, key, step):
            asked.append(step)
            return super().__call__(key, step)

    list(batches(Recorder(N, 0.1), random.key(0), start=10**9, stop=10**9 + 2))
    assert asked == [10**9, 10**9 + 1]


def test_parts_that_are_not_taken_are_skipped():
    """Catches: a micro-batch of one step that goes to the next."""
    draws = batches(PoissonSampler(N, 0.3), random.key(3), stop=4, microbatch_size=5)
    assert draws.per_step > 2
    firsts = [next(parts)[0][1].tolist() for _, parts in draws.by_step(_load(draws))]
    whole = {step: [label.tolist() for (_, label), _ in parts] for step, parts in draws.by_step(_load(draws))}
    assert firsts == [rows[0] for rows in whole.values()]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same(context):
    draws = batches(PoissonSampler(N, 0.2), random.key(4), stop=4, microbatch_size=8)
    alone = list(_load(draws))
    shared = list(_load(draws, num_workers=2, multiprocessing_context=context))
    for ((x, label), mask), ((other_x, other_label), other_mask) in zip(alone, shared, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(label, other_label)
        assert torch.equal(mask, other_mask)


def test_no_worker_gets_the_key():
    """Catches: a collate function that brings its sampler along."""
    key = random.key(5)
    draws = batches(PoissonSampler(N, 0.2), key, stop=4)
    sent = pickle.dumps((DATASET, draws.collate(DATASET)))
    assert bytes(key.tolist()) not in sent
    assert b"PoissonSampler" not in sent
    assert "PoissonSampler" in repr(pickle.dumps(PoissonSampler(N, 0.2)))


class _Tokens(Dataset):
    """Items of different length, as a tokenizer gives them."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return N

    def __getitem__(self, row):
        length = 1 + row % 4
        return self.kind({"input_ids": torch.full((length,), row + 1), "labels": torch.tensor(row % 2)})


def _pad_tokens(items):
    ids = torch.zeros(len(items), 4, dtype=torch.int64)
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = item["input_ids"]
    return type(items[0])({"input_ids": ids, "labels": torch.stack([item["labels"] for item in items])})


def _batch_encoding(items):
    return pytest.importorskip("transformers").BatchEncoding(items)


@pytest.mark.parametrize("kind", [dict, UserDict, _batch_encoding])
def test_a_collate_function_of_ones_own(kind):
    """Catches: mappings that are taken for something else, and items that are padded before they are collated."""
    dataset = _Tokens(kind)
    draws = batches(PoissonSampler(N, 0.2, 25), random.key(6), stop=3)
    loader = DataLoader(dataset, batch_sampler=draws, collate_fn=draws.collate(dataset, _pad_tokens))
    for batch, mask in loader:
        assert type(batch) is type(dataset[0])
        assert batch["input_ids"].shape == (25, 4)
        assert (batch["input_ids"][~mask, 0] == 1).all()
        assert batch["labels"].shape == mask.shape == (25,)


def test_a_step_takes_what_a_loader_gives():
    """Catches: a batch and a mask that a step cannot use; and accumulated sums that are not those of the whole draw."""
    sampler, weight = PoissonSampler(N, 0.3), torch.zeros(3)

    def loss(params, example):
        x, label = example
        return ((params * x).sum() - label) ** 2

    clipped = pegrad.clipped_grad(loss, clip_norm=1.0)
    whole, parts = batches(sampler, random.key(7), stop=2), batches(sampler, random.key(7), stop=2, microbatch_size=4)
    sums = [clipped(weight, batch, mask).grads for batch, mask in _load(whole)]
    for step, micro in parts.by_step(_load(parts)):
        assert torch.allclose(sum(clipped(weight, batch, mask).grads for batch, mask in micro), sums[step], atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_users_through_a_loader(microbatch_size):
    """Catches: records that go to another user, and a mask of records that is off by one."""
    owners = torch.arange(N) % 9
    sampler = UserSampler(owners, PoissonSampler(9, 0.4), 4)
    draws = batches(sampler, random.key(8), stop=5, microbatch_size=microbatch_size)
    loader = DataLoader(ByUser(DATASET), batch_sampler=draws, collate_fn=draws.collate(DATASET), num_workers=1)
    for step, parts in draws.by_step(loader):
        draw = sampler(random.key(8), step)
        ((x, label), present), mask = _joined(list(parts), sampler.rows)
        assert x.shape == (sampler.rows, 4, 3)
        assert torch.equal(mask, draw.mask)
        assert torch.equal(present, draw.records)
        assert torch.equal(torch.where(present, label, 0), draw.indices)


def _joined(parts, rows):
    """Lay micro-batches end to end again."""
    columns = [
        torch.cat(column)[:rows]
        for column in zip(*[(x, label, present, mask) for ((x, label), present), mask in parts], strict=True)
    ]
    x, label, present, mask = columns
    return ((x, label), present), mask


def test_users_of_a_subset_are_loaded_at_once():
    """Catches: a data set's own way to load many rows passed by."""
    asked = []

    class Many(Subset):
        def __getitems__(self, rows):
            asked.append(rows)
            return super().__getitems__(rows)

    assert [int(label) for _, label in ByUser(Many(DATASET, range(N)))[(3, 5)]] == [3, 5]
    assert asked == [[3, 5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: batches(0.1, random.key(0), stop=1), "sampler of pegrad.sampling, got float"),
        (lambda: batches(PoissonSampler(N, 0.1), torch.zeros(2), stop=1), "Expected a key"),
        (lambda: batches(PoissonSampler(N, 0.1), random.key(0), start=-1, stop=1), "start=-1"),
        (lambda: batches(PoissonSampler(N, 0.1), random.key(0), start=3, stop=2), "stop to be an integer >= 3"),
        (lambda: batches(PoissonSampler(N, 0.1), random.key(0), stop=1, microbatch_size=0), "microbatch_size=0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_collate_function_that_loses_rows_is_refused():
    draws = batches(PoissonSampler(N, 0.1, 20), random.key(0), stop=1)
    with pytest.raises(ArgumentError, match="collate_fn made 1 rows of 20 items"):
        draws.collate(DATASET, lambda items: torch.zeros(1, 20))([])
    with pytest.raises(LeafError, match="is of type str"):
        draws.collate(DATASET, lambda items: {"text": "words"})([])
