"""The private step on 1, 2 and 4 processes: one mechanism, whatever the ranks are."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import SIZES
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pegrad
from pegrad import Adaptive, optim, random
from pegrad.clipping import PerLayer, PerLeaf
from pegrad.distributed import (
    AgreementError,
    ExactSum,
    FastSum,
    compose,
    data_parallel,
    gather,
    load,
    pipelined,
    restore,
    save,
    shard,
    split,
    whole,
)
from pegrad.distributed.agreement import _hash
from pegrad.dp_sgd import add_noise
from pegrad.errors import ArgumentError, DataFileError, LeafError, LossError
from pegrad.sampling import Draw, PoissonSampler

SAMPLER = PoissonSampler(60, 0.25, max_batch_size=40)
SUMS = {"fast": FastSum, "exact": ExactSum}


def loss(params, example):
    x, y = example
    return torch.nn.functional.cross_entropy(params["b"] @ torch.tanh(params["a"] @ x), y)


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(60, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (60,), generator=generator)
    a, b = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((4, 5), (3, 4)))
    return {"a": a, "b": b}, data


def private(clip_norm=1.0, noise_multiplier=0.5, optimizer=None, loss=loss, **kwargs):
    return pegrad.dp_sgd(
        loss,
        optimizer or optim.adam(0.1),
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        expected_batch_size=15.0,
        sampler=SAMPLER,
        **kwargs,
    )


def train(group, sums, *, size=8, steps=3, step=None, draws=None, dtype=torch.float32, sharded=False):
    """Take some steps, and return parameters and state."""
    params, data = problem(dtype)
    params = shard(params, group) if sharded else params
    step = data_parallel(step or private(), group, summation=SUMS[sums])
    state = step.init(params, random.key(1))
    for t in range(steps):
        draw = draws[t] if draws else SAMPLER(random.key(2), t)
        shares = split(draw, group, microbatch_size=size)
        params, state, _ = step.accumulate(params, state, [(load(data, share), share) for share in shares])
    return gather(params), state._replace(optimizer=gather(state.optimizer))


def alone(*, steps=3, step=None, draws=None, dtype=torch.float32):
    """Take the same steps as one process does without this module."""
    params, data = problem(dtype)
    step = step or private()
    state = step.init(params, random.key(1))
    for t in range(steps):
        draw = draws[t] if draws else SAMPLER(random.key(2), t)
        params, state, _ = step(params, state, pegrad.sampling.gather(data, draw), draw.mask)
    return params, state


def same_bits(ours, theirs):
    both = zip(pegrad.trees.leaves(ours), pegrad.trees.leaves(theirs), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in both)


def drawn(*rows, room=12):
    mask = torch.arange(room) < len(rows)
    return Draw(torch.tensor([*rows, *[0] * (room - len(rows))]), mask)


@pytest.mark.parametrize("sums", SUMS)
def test_every_rank_ends_with_the_same_bits_and_they_are_those_of_one_process(pool, sums):
    expected, _ = alone(dtype=torch.float64)
    for size in SIZES:
        for microbatch in 8, None:
            answers = pool.run(job_train, size, sums, microbatch, torch.float64)
            for params, state in answers:
                assert same_bits((params, state.optimizer), (answers[0][0], answers[0][1].optimizer))
                assert state.step == 3
            for name, leaf in expected.items():
                torch.testing.assert_close(answers[0][0][name], leaf, rtol=1e-9, atol=1e-9)


def job_train(group, sums, size, dtype):
    return train(group, sums, size=size, dtype=dtype)


def test_the_exact_sum_has_the_same_bits_on_any_number_of_ranks(pool):
    params = [pool.run(job_train, size, "exact", 8, torch.float32)[0][0] for size in SIZES]
    assert same_bits(params[0], params[1])
    assert same_bits(params[0], params[2])


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("clip_norm", [1.0, Adaptive(0.5, count_noise_multiplier=3.0)], ids=["flat", "adaptive"])
def test_sharded_steps_are_the_whole_ones(pool, sums, clip_norm):
    """Bit for bit where the sum is exact; rows that no rank has, or one has all of, included."""
    for size in SIZES:
        whole, sharded = (pool.run(job_sharded, size, sums, clip_norm, sharded) for sharded in (False, True))
        for (params, state), (expected, _) in zip(sharded, whole, strict=True):
            assert sums != "exact" or same_bits(params, expected)
            for name in expected:
                torch.testing.assert_close(params[name], expected[name], rtol=1e-5, atol=1e-5)
            assert same_bits(state.optimizer, sharded[0][1].optimizer)


def job_sharded(group, sums, clip_norm, sharded):
    return train(group, sums, step=private(clip_norm), sharded=sharded)


@pytest.mark.parametrize("strategy", ["auto", "book_keeping", "ghost"])
def test_parameters_that_are_never_gathered_get_the_same_sums(pool, strategy):
    """Norms are those of whole gradients, whatever part of a parameter a rank has, and so is what comes of them."""
    expected, _ = alone(dtype=torch.float64)
    for size in SIZES:
        for answer in pool.run(job_never_gathered, size, strategy):
            for name in expected:
                torch.testing.assert_close(answer[name], expected[name], rtol=1e-9, atol=1e-9)


def job_never_gathered(group, strategy, sums=FastSum):
    params, data = problem(torch.float64)
    params = shard(params, group)

    def in_parts(params, example):
        return loss({"a": whole(params["a"], 4, group), "b": params["b"]}, example)

    step = data_parallel(
        private(loss=in_parts, strategy=strategy), group, summation=sums, gathered={"a": False, "b": True}
    )
    state = step.init(params, random.key(1))
    for t in range(3):
        shares = split(SAMPLER(random.key(2), t), group, microbatch_size=8)
        params, state, _ = step.accumulate(params, state, [(load(data, share), share) for share in shares])
    return gather(params)


def test_whole_is_for_traced_losses_and_sums_in_floating_point(pool):
    for strategy in "vmap", "naive", "grouped_conv":
        for answer in pool.run(job_never_gathered, 2, strategy):
            assert isinstance(answer, LossError)
            assert "needs a strategy that traces the loss" in str(answer)
    for answer in pool.run(job_never_gathered, 2, "auto", ExactSum):
        assert isinstance(answer, ArgumentError)
        assert "where sums are exact" in str(answer)
    torch.testing.assert_close(whole(torch.ones(3, 2), 3), torch.ones(3, 2))
    with pytest.raises(ArgumentError, match="the 4 of 4 rows that rank 0 of 1 has"):
        whole(torch.ones(3, 2), 4)


def test_an_optimizer_that_is_not_elementwise_runs_on_no_shard(pool):
    for answer in pool.run(job_not_elementwise, 2):
        assert isinstance(answer, ArgumentError)
        assert "treats a part of a tensor otherwise" in str(answer)


def job_not_elementwise(group):
    def update(grads, state, params):
        return pegrad.trees.map(lambda g: -g / g.norm(), grads), state

    params = shard(problem()[0], group)
    return data_parallel(private(optimizer=(lambda params: (), update)), group).init(params, random.key(1))


def test_what_cannot_be_sharded_is_refused(pool):
    with pytest.raises(ArgumentError, match="init_process_group"):
        shard({"w": torch.ones(3)})
    for said in pool.run(job_refused_shards, 4):
        expected = [
            "Expected a whole tensor at leaf ['w'], got float",
            "Expected a mesh of one dimension, got 2: take one, as in mesh['data']",
            "A leaf of params is a DTensor with placements (Replicate(),) on 4 ranks",
            "A leaf of params is a DTensor with placements (Shard(dim=0),) on 2 ranks",
            "Expected gathered to be a prefix of params, True or False for each part",
        ]
        for message, beginning in zip(said, expected, strict=True):
            assert message.startswith(beginning)


def job_refused_shards(group):
    params, data = problem()
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    (share,) = split(drawn(1, 2, 3), group)

    def taken(params, **kwargs):
        step = data_parallel(private(), group, **kwargs)
        step(params, private().init(problem()[0], random.key(1)), load(data, share), share)

    calls = [
        lambda: shard({"w": 1.0}, group),
        lambda: shard(params, square),
        lambda: taken({**params, "a": distribute_tensor(params["a"], mesh, [Replicate()], src_data_rank=None)}),
        lambda: taken({**params, "a": shard(params["a"], square["data"])}),
        lambda: taken(shard(params, group), gathered={"other": True}),
    ]
    said = []
    for call in calls:
        try:
            call()
        except (ArgumentError, LeafError) as error:
            said.append(str(error))
    return said


def test_shards_hold_a_part_of_everything(pool):
    for rank, (params, state) in enumerate(pool.run(job_shards, 4)):
        assert [tuple(leaf.shape) for leaf in params] == [(1, 5), (1 if rank < 3 else 0, 4)]
        assert [tuple(leaf.shape) for leaf in state] == [(1, 5), (1 if rank < 3 else 0, 4)] * 2


def job_shards(group):
    params, data = problem()
    params = shard(params, group)
    step = data_parallel(private(), group)
    state = step.init(params, random.key(1))
    (share,) = split(drawn(1, 2, 3), group)
    params, state, _ = step(params, state, load(data, share), share)
    parts = [[leaf for leaf in pegrad.trees.leaves(tree) if isinstance(leaf, DTensor)] for tree in (params, state)]
    return [[leaf.to_local() for leaf in some] for some in parts]


def test_one_rank_takes_the_step_of_a_single_process():
    """Catches a path of its own for one rank: without a group, the bits are those of `dp_sgd`."""
    params, _ = train(None, "fast", size=None)
    assert same_bits(params, alone()[0])


def test_a_share_is_a_part_of_the_draw():
    draw = SAMPLER(random.key(2), 0)
    (share,) = split(draw)
    assert torch.equal(share.indices, draw.indices)
    assert torch.equal(share.mask, draw.mask)
    shares = split(draw, microbatch_size=16)
    assert [len(share.mask) for share in shares] == [16, 16, 16]
    assert torch.equal(torch.cat([share.indices[share.mask] for share in shares]), draw.indices[draw.mask])


@pytest.mark.parametrize("draw", [drawn(), drawn(7), drawn(3, 4, 5, 6, 7), drawn(*range(12))])
@pytest.mark.parametrize("sums", SUMS)
def test_ranks_without_rows(pool, draw, sums):
    """Empty, one row, uneven, full."""
    expected, _ = alone(steps=1, draws=[draw], dtype=torch.float64)
    for params, _ in pool.run(job_draw, 4, draw, sums):
        for name, leaf in expected.items():
            torch.testing.assert_close(params[name], leaf, rtol=1e-9, atol=1e-9)


def job_draw(group, draw, sums):
    return train(group, sums, size=None, steps=1, draws=[draw], dtype=torch.float64)


def test_adaptive_bounds_follow_the_counts_of_all_ranks(pool):
    step = private(Adaptive(0.5, count_noise_multiplier=3.0))
    _, expected = alone(step=step)
    for sums in SUMS:
        for _, state in pool.run(job_adaptive, 4, sums):
            assert state.bounds == pytest.approx(expected.bounds, rel=1e-12)
    assert expected.bounds != (0.5,)


def job_adaptive(group, sums):
    return train(group, sums, step=private(Adaptive(0.5, count_noise_multiplier=3.0)))


def nothing_learned(params, example):
    return sum((leaf * 0).sum() for leaf in params.values())


WIDE = {"w": torch.zeros(40_000)}


def released(group, sums):
    """Release noise alone: every gradient is zero."""
    step = data_parallel(private(noise_multiplier=3.0, loss=nothing_learned), group, summation=SUMS[sums])
    state = step.init(WIDE, random.key(5))
    (share,) = split(drawn(1, 2, 3), group)
    return step.release(WIDE, state, [(torch.zeros(len(share.mask)), share)]).grads["w"]


def test_noise_is_added_once_whatever_the_ranks_are(pool):
    """The law over ranks, and the two ways of getting it wrong, which this test must see."""
    std = 3.0 / 15
    for sums in SUMS:
        whole = released(None, sums)
        for size in SIZES:
            for noise in pool.run(job_noise, size, sums):
                assert torch.equal(noise, whole)
                assert follows(noise, std)
    for planted, factor in ("own keys", 2.0), ("same key", 4.0):
        for noise in pool.run(job_planted, 4, planted):
            assert not follows(noise, std)
            assert follows(noise, std * factor)


def follows(noise, std):
    """Whether 40,000 numbers have this standard deviation; its own estimate deviates by 0.35%."""
    return abs(noise.std().item() / std - 1) < 0.02


def job_noise(group, sums):
    return released(group, sums)


def job_planted(group, which):
    """Every rank adds noise to its own sum, and then the sums are added up."""
    key = random.fold_in(random.key(5), dist.get_rank(group) if which == "own keys" else 0)
    own = add_noise(key, WIDE, 3.0 / 15, step=0)["w"]
    dist.all_reduce(own, group=group)
    return own


@pytest.mark.parametrize("sums", SUMS)
def test_one_example_moves_the_sum_of_all_ranks_by_at_most_the_sensitivity(pool, sums):
    clipping = PerLeaf(1.0)
    for value in (0.3, 1e3, 1e30, math.inf, math.nan):
        with_, without = (pool.run(job_neighbour, 4, sums, clipping, value, rows)[3] for rows in ((1, 2, 3), (1, 2)))
        moved = math.sqrt(sum((with_[name] - without[name]).double().square().sum().item() for name in with_))
        assert moved <= clipping.sensitivity / 15 * (1 + 1e-5)
        if value == 1e3:
            assert moved > 0


def job_neighbour(group, sums, clipping, value, rows):
    params, data = problem()
    data[0][3] = value
    step = data_parallel(private(clipping, noise_multiplier=0.0), group, summation=SUMS[sums])
    state = step.init(params, random.key(1))
    (share,) = split(drawn(*rows), group)
    return step.release(params, state, [(load(data, share), share)]).grads


def test_what_is_not_a_step_is_refused():
    with pytest.raises(ArgumentError, match="DPSGD"):
        data_parallel(loss)
    with pytest.raises(ArgumentError, match="Draw of pegrad"):
        split(torch.ones(3))
    with pytest.raises(ArgumentError, match="microbatch_size"):
        split(drawn(1), microbatch_size=0)
    with pytest.raises(ArgumentError, match="DeviceMesh"):
        data_parallel(private(), "everyone")
    params, data = problem()
    step = data_parallel(private())
    state = step.init(params, random.key(1))
    with pytest.raises(ArgumentError, match="Share of pegrad"):
        step(params, state, data, torch.ones(60, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="micro-batch at the least"):
        step.accumulate(params, state, [])
    with pytest.raises(ArgumentError, match="rows in an exact sum"):
        ExactSum(private().clipped_grad, 1 << 23, lambda leaf, own: own)


WRONG = {
    "key": lambda step, params, state, shares: (step, params, state._replace(key=random.key(9)), shares),
    "number of the step": lambda step, params, state, shares: (step, params, state._replace(step=1), shares),
    "parameters": lambda step, params, state, shares: (step, {**params, "a": params["a"] + 1e-7}, state, shares),
    "clip norm": lambda step, params, state, shares: (private(1.5), params, state, shares),
    "noise multiplier": lambda step, params, state, shares: (private(noise_multiplier=1), params, state, shares),
    "expected batch size": lambda step, params, state, shares: (
        pegrad.dp_sgd(
            loss, optim.adam(0.1), clip_norm=1.0, noise_multiplier=0.5, expected_batch_size=16, sampler=SAMPLER
        ),
        params,
        state,
        shares,
    ),
    "micro-batch size": lambda step, params, state, shares: (private(microbatch_size=2), params, state, shares),
    "draw": lambda step, params, state, shares: (step, params, state, shares_of(drawn(1, 2, 3, 4, 6))),
    "state of the optimizer": lambda step, params, state, shares: (
        step,
        params,
        state._replace(optimizer=pegrad.trees.map(lambda leaf: leaf + 1, state.optimizer)),
        shares,
    ),
    "shares": lambda step, params, state, shares: (step, params, state, [*shares, shares[0]]),
    "failed": lambda step, params, state, shares: (private(loss=undefined), params, state, shares),
    "Share": lambda step, params, state, shares: (step, params, state, None),
}


def undefined(params, example):
    raise RuntimeError("a failure of one rank")


def shares_of(draw):
    return split(draw, SHARED["group"])


SHARED = {}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_ranks_must_have_in_common_is_checked(pool, wrong):
    """Every rank raises, none hangs, and the group is as good as before."""
    for size in 2, 4:
        answers = pool.run(job_wrong, size, wrong)
        assert all(isinstance(answer, Exception) for answer in answers), answers
        assert all(isinstance(answer, AgreementError) for answer in answers[:-1])
        if wrong == "failed":
            assert "a failure of one rank" in str(answers[-1])
        elif wrong == "Share":
            assert isinstance(answers[-1], ArgumentError)
        else:
            assert wrong in str(answers[-1])
            assert "nothing was released" in str(answers[0])
    assert not any(isinstance(answer, Exception) for answer in pool.run(job_train, 4, "fast", 8, torch.float32))


def job_wrong(group, wrong):
    SHARED["group"] = group
    params, data = problem()
    step, shares = private(), split(drawn(1, 2, 3, 4, 5), group)
    state = step.init(params, random.key(1))
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        step, params, state, shares = WRONG[wrong](step, params, state, shares)
    parts = [(data, None)] if shares is None else [(load(data, share), share) for share in shares]
    return data_parallel(step, group).accumulate(params, state, parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_large_tensors_that_differ_in_one_bit_are_told_apart(dtype):
    """By their hashes, of all bits: those of the sign included, which fill a 64-bit number."""
    tensor = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    hashes = {_hash(tensor), _hash(-tensor)}
    for index in 0, 49_999:
        other = tensor.clone()
        other.view(torch.uint8)[index * tensor.element_size()] ^= 1
        hashes.add(_hash(other))
    assert len(hashes) == 4
    assert _hash(tensor.clone()) in hashes
    assert all(0 <= number < 1 << 63 for number in hashes)


def test_tensors_of_every_size_are_told_apart():
    """Sizes that are no multiple of a word, empty ones, and parts of a tensor that begin anywhere."""
    for dtype in torch.bool, torch.float16, torch.float32, torch.float64:
        for size in range(20):
            tensor = torch.ones(size, dtype=dtype)
            assert _hash(torch.ones(size + 3, dtype=dtype)[3:]) == _hash(tensor)
            assert _hash(torch.ones(size + 1, dtype=dtype)) != _hash(tensor)
            if size:
                tensor[-1] = 0
                assert _hash(tensor) != _hash(torch.ones(size, dtype=dtype))


def test_a_draw_that_every_rank_uses_whole_is_refused(pool):
    """It would move the sum by as many sensitivities as there are ranks."""
    (share,) = split(drawn(1, 2, 3))  # as if each rank were alone
    for size in 2, 4:
        for answer in pool.run(job_whole, size, share):
            assert isinstance(answer, AgreementError)
            assert "every micro-batch once" in str(answer)


def job_whole(group, share):
    params, data = problem()
    step = data_parallel(private(), group)
    return step(params, step.init(params, random.key(1)), load(data, share), share)


def test_ranks_take_equally_many_collectives(pool):
    """Catches a rank that leaves one out where it has no rows: the others would wait for it."""
    counts = pool.run(job_counted, 4)
    assert len(set(counts)) == 1
    assert counts[0] == 3 * (1 + 2)  # one exchange and two leaves a step


def job_counted(group):
    calls = []
    reduce, gather = dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda *args, **kwargs: calls.append("sum") or reduce(*args, **kwargs)
    dist.all_gather = lambda *args, **kwargs: calls.append("exchange") or gather(*args, **kwargs)
    try:
        train(group, "fast", draws=[drawn(), drawn(1), drawn(*range(12))])
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
    return len(calls)


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES, "auto"])
def test_modules_and_tensors_that_are_split_are_refused_in_the_loss(pool, strategy):
    """They get no gradient, without a word; so does a weight that the loss has from elsewhere."""
    wrapped, split_up, captured, created = pool.run(job_strangers, 1, strategy)[0]
    assert "which FSDP has wrapped" in wrapped
    assert "meets a DTensor" in split_up
    assert "requires a gradient and is no parameter" in captured
    assert created == ""


def job_strangers(group, strategy):
    warnings.simplefilter("ignore")
    mesh = DeviceMesh.from_group(group, "cpu")
    module = fully_shard(nn.Linear(3, 2), mesh=mesh)
    whole = nn.Linear(3, 2)
    part = distribute_tensor(torch.ones(3), mesh, [Shard(0)])

    def created(params, x):
        with torch.enable_grad():
            z = torch.zeros(3, requires_grad=True)
            (z * 2).sum()
        return (params["w"] * x).sum()

    losses = [
        lambda params, x: module(x).sum() + (params["w"] * x).sum(),
        lambda params, x: (part * x).sum() + (params["w"] * x).sum(),
        lambda params, x: whole(x).sum() + (params["w"] * x).sum(),
        created,
    ]
    said = []
    for each in losses:
        try:
            pegrad.clipped_grad(each, clip_norm=1.0, strategy=strategy)({"w": torch.ones(3)}, torch.ones(4, 3))
            said.append("")
        except LossError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_from_a_checkpoint_on_other_ranks_with_the_same_bits(pool, tmp_path, sharded):
    """Saved on 2 ranks, taken up on 1, 2 and 4."""
    through = pool.run(job_train, 2, "exact", 8, torch.float32)[0]
    pool.run(job_first_half, 2, str(tmp_path / "half"), sharded)
    for size in SIZES:
        for params, state in pool.run(job_second_half, size, str(tmp_path / "half"), sharded):
            assert same_bits(params, through[0])
            assert same_bits(state.optimizer, through[1].optimizer)
            assert torch.equal(state.key, through[1].key)
            assert state.ledger == through[1].ledger
            assert state.step == 3


def job_first_half(group, folder, sharded):
    params, state = begun(group, sharded)
    params, state = some_steps(group, params, state, range(2))
    save(folder, params, state, group)


def job_second_half(group, folder, sharded):
    params, state = restore(folder, *begun(group, sharded), group)
    params, state = some_steps(group, params, state, range(2, 3))
    return gather(params), state._replace(optimizer=gather(state.optimizer))


def begun(group, sharded):
    params, _ = problem()
    params = shard(params, group) if sharded else params
    return params, data_parallel(private(), group).init(params, random.key(1))


def some_steps(group, params, state, steps):
    _, data = problem()
    step = data_parallel(private(), group, summation=ExactSum)
    for t in steps:
        shares = split(SAMPLER(random.key(2), t), group, microbatch_size=8)
        params, state, _ = step.accumulate(params, state, [(load(data, share), share) for share in shares])
    return params, state


def test_half_a_checkpoint_is_none(tmp_path):
    params, state = begun(None, False)
    with pytest.raises(DataFileError, match="no whole checkpoint"):
        restore(tmp_path / "nowhere", params, state)
    save(tmp_path / "half", params, state)
    (tmp_path / "half" / "state.pt").unlink()
    with pytest.raises(DataFileError, match="no whole checkpoint"):
        restore(tmp_path / "half", params, state)
    save(tmp_path / "other", {"a": params["a"]}, state._replace(optimizer=()))
    with pytest.raises(DataFileError, match="no whole checkpoint"):
        restore(tmp_path / "other", params, state)


STAGES = (
    lambda params, x: torch.tanh(params["a"] @ x),
    lambda params, given: torch.nn.functional.cross_entropy(params["b"] @ given[0], given[1]),
)


def staged_step(clip_norm, noise_multiplier, stages=STAGES):
    return private(clip_norm, noise_multiplier, loss=compose(stages))


@pytest.mark.parametrize("clip_norm", [1.0, PerLayer(1.0, depth=1)], ids=["flat", "by stage"])
def test_a_pipeline_by_data_parallel_takes_the_step_of_one_process(pool, clip_norm):
    """Two pipelines of two stages share every batch."""
    params, data = problem(torch.float64)
    params = [{"a": params["a"]}, {"b": params["b"]}]
    step = staged_step(clip_norm, 0.0)
    state = step.init(params, random.key(1))
    for t in range(3):
        draw = SAMPLER(random.key(2), t)
        params, state, _ = step(params, state, pegrad.sampling.gather(data, draw), draw.mask)
    for rank, found in enumerate(pool.run(job_pipelines, 4, clip_norm)):
        (name,) = found[0]
        torch.testing.assert_close(found[0][name], params[rank % 2][name], rtol=1e-9, atol=1e-9)


def job_pipelines(group, clip_norm):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    params, data = problem(torch.float64)
    params = [[{"a": params["a"]}], [{"b": params["b"]}]][mesh["pipe"].get_local_rank()]
    step = pipelined(staged_step(clip_norm, 0.0), STAGES, mesh["pipe"], microbatch_size=4)
    step = data_parallel(step, mesh["data"])
    state = step.init(params, random.key(1))
    for t in range(3):
        (share,) = split(SAMPLER(random.key(2), t), mesh["data"])
        params, state, _ = step(params, state, load(data, share), share)
    return params


def test_stages_get_noise_of_their_own(pool):
    """Each of the stated law, and none that of another."""
    first, second = pool.run(job_stage_noise, 2)
    assert follows(first, 3.0 / 15)
    assert follows(second, 3.0 / 15)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.03


def job_stage_noise(group):
    stages = [
        lambda params, x: x + 0 * params["w"].sum(),
        lambda params, given: given[0].sum() * 0 + 0 * params["w"].sum(),
    ]
    step = pipelined(staged_step(1.0, 3.0, stages), stages, group, microbatch_size=2)
    state = step.init([WIDE], random.key(5))
    batch = torch.zeros(4, 3), torch.zeros(4)
    return step.release([WIDE], state, [(batch, None)]).grads[0]["w"]


@pytest.mark.parametrize("wrong", ["key", "number of the step", "noise multiplier", "sampler"])
def test_the_ranks_of_a_pipeline_take_one_step(pool, wrong):
    """Noise of another law on one stage, or of another run, would be found by nobody: every rank raises."""
    for answer in pool.run(job_wrong_stage, 2, wrong):
        assert isinstance(answer, AgreementError)
        assert f"do not have the same {wrong}" in str(answer)


def job_wrong_stage(group, wrong):
    params, data = problem()
    step = staged_step(1.0, 0.5)
    state = step.init([params], random.key(1))
    if dist.get_rank(group) == 1:
        step, state = {
            "key": (step, state._replace(key=random.key(2))),
            "number of the step": (step, state._replace(step=1)),
            "noise multiplier": (staged_step(1.0, 0.4), state),
            "sampler": (dataclasses.replace(step, sampler=None), state),
        }[wrong]
    own = [[{"a": params["a"]}], [{"b": params["b"]}]][dist.get_rank(group)]
    return pipelined(step, STAGES, group, microbatch_size=2).release(own, state, [((data[0][:8], data[1][:8]), None)])


def test_no_pipeline_adapts_its_clip_norm():
    with pytest.raises(ArgumentError, match="got Adaptive"):
        pipelined(staged_step(Adaptive(1.0, count_noise_multiplier=3.0), 1.0), STAGES, microbatch_size=1)
    with pytest.raises(ArgumentError, match="DPSGD"):
        pipelined(loss, STAGES, microbatch_size=1)


def test_a_rank_that_dies_ends_the_others_and_nothing_is_half_applied(tmp_path):
    """The other rank gets an error within the time-out, and its parameters and state are those before the step."""
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=dying, args=(rank, tmp_path / "store", answers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    error, unchanged, seconds = answers.get()
    assert isinstance(error, RuntimeError)
    assert unchanged
    assert seconds < 20
    assert [process.exitcode for process in processes] == [0, 7]


def dying(rank, meeting, answers):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=10)
    )
    params, data = problem()

    def mortal(params, example):
        if dist.get_rank() == 1 and state.step == 1:
            os._exit(7)
        return loss(params, example)

    step = data_parallel(private(loss=mortal))
    state = step.init(params, random.key(1))
    for t in range(2):
        (share,) = split(SAMPLER(random.key(2), t))
        before = copy.deepcopy((params, state))
        start = time.perf_counter()
        try:
            params, state, _ = step(params, state, load(data, share), share)
        except Exception as error:
            unchanged = same_bits((params, state.optimizer), (before[0], before[1].optimizer)) and state.step == 1
            answers.put((error, unchanged, time.perf_counter() - start))
            os._exit(0)  # an ordinary end may be an abort: gloo's threads had a rank to talk to


@pytest.mark.slow
def test_torchrun_trains(tmp_path):
    """Two processes share every batch, one of them tells of it, and the run goes on with as many, not with others."""
    folder = tmp_path / "run"
    what = ["--batch-size", "32", "--epochs", "0.06", "--noise-multiplier", "20", "--seed", "1", "--out", str(folder)]
    command = ["-m", "pegrad", "train", *what]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(pegrad.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *together, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert "2 processes share every batch" in done.stdout
    report = json.loads((folder / "metrics.json").read_text())
    assert report["history"][-1]["step"] == 3
    assert report["history"][-1]["epsilon"] > 0
