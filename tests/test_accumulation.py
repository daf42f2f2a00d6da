"""A batch that arrives micro-batch by micro-batch: the sum, the noise and the randomness of one in one piece."""

import io
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import oracle
import pegrad
from pegrad import optim, random, trees
from pegrad.accumulation import FEW
from pegrad.numerics import FLOAT32_ROWS

CLIP = 0.5


def loss(params, example):
    x, y = example
    return F.cross_entropy(F.linear(torch.tanh(F.linear(x, params["a"])), params["b"]), y), {"x": x.sum()}


def make_data(rows, dtype=torch.float64):
    torch.manual_seed(rows)
    params = {"a": torch.randn(5, 4, dtype=dtype), "b": torch.randn(3, 5, dtype=dtype)}
    return params, (3 * torch.randn(rows, 4, dtype=dtype), torch.randint(3, (rows,)))


def cut(batch, sizes, mask=None):
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        yield trees.map(lambda leaf, rows=rows: leaf[rows], batch), None if mask is None else mask[rows]
        start += size


def accumulated(clipped, params, parts):
    sums = clipped.init(params)
    for batch, mask in parts:
        sums = clipped.add(sums, params, batch, mask).sums
    return clipped.finish(sums)


def make_step(loss=loss, **changes):
    arguments = {"clip_norm": CLIP, "noise_multiplier": 1.3, "expected_batch_size": 12}
    return pegrad.dp_sgd(loss, changes.pop("optimizer", optim.sgd(1.0)), **(arguments | changes))


CUTS = [[24], [1] * 24, [5, 0, 7, 12], [23, 1], [2] * 12]


@pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
@pytest.mark.parametrize("sizes", CUTS)
def test_the_cut_of_a_batch_changes_nothing(sizes, strategy):
    """Catches: a micro-batch lost or counted twice, a division by each one's size, a mask of another one's rows."""
    params, batch = make_data(24)
    mask = torch.arange(24) % 5 != 2
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP, strategy=strategy, normalize_by=7.0)
    alone = oracle.per_example_grads(lambda p, x: loss(p, x)[0], params, batch)
    expected = [leaf / 7 for leaf in oracle.clipped_sum([leaf[mask] for leaf in alone], CLIP)]
    oracle.assert_close(accumulated(clipped, params, cut(batch, sizes, mask)), expected)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("at", [0, 11, 23])
def test_one_example_moves_any_cut_by_at_most_the_sensitivity(sizes, at):
    """Catches: a sum that rounds an example away, or an example that is added in two micro-batches."""
    params, batch = make_data(24, torch.float32)
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP, normalize_by=7.0)
    without = torch.arange(24) != at
    both = [accumulated(clipped, params, cut(batch, sizes, mask)) for mask in (torch.ones(24).bool(), without)]
    moved = trees.leaves(trees.map(lambda a, b: (a.double() - b.double()).square().sum(), *both))
    assert 0 < sum(moved) ** 0.5 <= clipped.sensitivity * (1 + 1e-4)


def test_add_changes_nothing_that_it_was_given():
    """Catches: a sum that grows in place, so that one accumulator cannot be gone back to."""
    params, batch = make_data(24)
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP)
    steps = [clipped.init(params)]
    for part, mask in cut(batch, [2] * 12):
        steps.append(clipped.add(steps[-1], params, part, mask).sums)
    kept = [trees.map(torch.clone, sums.grads) for sums in steps]
    for sums, (part, mask) in zip(steps, cut(batch, [2] * 12), strict=False):
        clipped.add(sums, params, part, mask)
    assert all(map(torch.equal, trees.leaves(kept), trees.leaves([sums.grads for sums in steps])))
    assert [sums.rows for sums in steps] == list(range(0, 25, 2))


def test_a_long_sum_is_kept_in_float64():
    """Catches: a million additions in float32, in which a clipped gradient drowns."""
    params, part = torch.zeros(3), torch.ones(1, 3)
    clipped = pegrad.clipped_grad(lambda p, x: (p * x).sum(), clip_norm=1e6)
    big = clipped.add(clipped.init(params), params, 3e4 * part).sums
    sums = big._replace(parts=FEW)
    for _ in range(1000):
        sums = clipped.add(sums, params, 1e-4 * part).sums
    assert sums.grads.dtype == torch.float64
    assert clipped.finish(sums).dtype == torch.float64
    torch.testing.assert_close(
        clipped.finish(sums), torch.full((3,), 3e4 + 0.1, dtype=torch.float64), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("size", [3, 64, FLOAT32_ROWS, FLOAT32_ROWS + 1])
def test_the_dtype_is_that_of_the_whole_batch(size):
    """Catches: a float64 sum of few rows, whose noise would be of another keystream than the whole batch's."""
    params, batch = make_data(300, torch.float32)
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP)
    rows = trees.map(lambda leaf: leaf[:size], batch)
    whole = clipped(params, rows).grads
    for sizes in ([size], [1] * size, [size - 2, 2]):
        parts = accumulated(clipped, params, cut(rows, sizes))
        assert parts["a"].dtype == whole["a"].dtype
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_nothing_added_is_zero():
    """Catches: a sum over no micro-batch that has no shape, or that shares one number among all."""
    params, _ = make_data(1)
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP)
    zeros = clipped.finish(clipped.init(params))
    zeros["a"][0, 0] = 1
    assert zeros["a"].sum() == 1
    assert zeros["b"].shape == (3, 5)


def test_sums_of_other_parameters_are_refused():
    """Catches: a broadcast that adds gradients of another network."""
    params, batch = make_data(4)
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP)
    sums = clipped.init(params | {"b": torch.zeros(1, 5)})
    with pytest.raises(pegrad.LeafError, match="sums are of other parameters"):
        clipped.add(sums, params, batch)


@pytest.mark.parametrize("sizes", CUTS)
def test_noise_is_added_once_whatever_the_micro_batches(sizes):
    """Catches: noise for each micro-batch, as fastDP adds; or noise that depends on the cut."""
    params, batch = make_data(24)
    step = make_step()
    state = step.init(params, random.key(0))
    whole, parts = step(params, state, batch), step.accumulate(params, state, cut(batch, sizes))
    torch.testing.assert_close(parts.params, whole.params)
    assert parts.state.step == 1
    assert parts.state.ledger == whole.state.ledger
    assert parts.state.ledger.steps == 1
    for ours, theirs in zip(trees.leaves(parts.metrics), trees.leaves(whole.metrics), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert parts.metrics.aux["x"].shape == (24,)
    assert parts.metrics.mask.all()


def test_an_empty_stream_is_an_empty_batch():
    """Catches: a draw without examples that adds no noise, or that fails."""
    params, batch = make_data(4)
    step = make_step()
    state = step.init(params, random.key(0))
    none, empty = step.accumulate(params, state, iter(())), step(params, state, trees.map(lambda leaf: leaf[:0], batch))
    torch.testing.assert_close(none.params, empty.params, rtol=0, atol=0)
    assert none.metrics.losses.shape == (0,)
    assert none.metrics.mean_loss.isnan()


@pytest.mark.parametrize("given", ["rows", torch.ones(2), (torch.ones(2), None, 1)])
def test_a_micro_batch_is_a_pair(given):
    """Catches: a tensor unpacked into batch and mask along its rows."""
    params, _ = make_data(4)
    step = make_step()
    with pytest.raises(pegrad.ArgumentError, match="micro-batch 0 to be a pair"):
        step.accumulate(params, step.init(params, random.key(0)), [given])


def dropout_loss(params, x):
    return (params * F.dropout(x, 0.5)).sum()


@pytest.mark.parametrize("strategy", ["vmap", "book_keeping", "naive"])
def test_dropout_is_independent_for_each_micro_batch_and_repeats(strategy):
    """Catches: the same masks for every micro-batch; masks that the process's generator has a part in."""
    step = make_step(dropout_loss, clip_norm=1e6, noise_multiplier=0.0, strategy=strategy)
    params, ones = torch.zeros(200), torch.ones(2, 200)
    state = step.init(params, random.key(0))
    before = torch.get_rng_state()
    first = step.release(params, state, [(ones, None)]).grads
    both = step.release(params, state, [(ones, None), (ones, None)]).grads
    torch.rand(5)
    assert torch.equal(step.release(params, state, [(ones, None), (ones, None)]).grads, both)
    second = both - first
    agree = (second == first).double().mean()
    assert 0.2 < agree < 0.55  # of sums of two coins: 3/8
    torch.set_rng_state(before)
    later = step.release(params, state._replace(step=1), [(ones, None)]).grads
    assert not torch.equal(later, first)


def test_a_stream_is_taken_one_by_one_at_constant_memory():
    """Catches: a list made of the stream, a graph kept from one micro-batch to the next."""
    params = torch.zeros(10)
    alive: list[int] = []
    refs: list[weakref.ref] = []

    def stream():
        for _ in range(50):
            alive.append(sum(ref() is not None for ref in refs))
            part = torch.ones(4, 10)
            refs.append(weakref.ref(part))
            yield part, None

    step = make_step(lambda p, x: (p * x).sum())
    out = step.accumulate(params, step.init(params, random.key(0)), stream())
    assert max(alive) <= 2
    assert out.metrics.losses.shape == (200,)


FRESH = """
import sys
import torch, pegrad

def loss(params, x):
    return torch.compile(lambda p, x: (p * x).sum(), backend="eager")(params, x)

step = pegrad.dp_sgd(loss, pegrad.optim.sgd(1.0), clip_norm=1e6, noise_multiplier=0.0, expected_batch_size=12)
params = torch.zeros(3)
assert "torch._dynamo" not in sys.modules
stream = ((torch.ones(2, 3), None) for _ in range(3))
print(step.accumulate(params, step.init(params, pegrad.random.key(0)), stream).params.tolist())
"""


@pytest.mark.slow
def test_a_loader_is_taken_once_though_the_loss_compiles():
    """Catches: a step that runs anew once dynamo is there, and finds its loader used up."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[-0.5, -0.5, -0.5]\n", done.stderr


def test_a_stream_in_inference_mode_is_trained_on():
    """Catches: gradients that inference mode does not record."""
    params = torch.zeros(3)
    step = make_step(lambda p, x: (p * x).sum(), noise_multiplier=0.0, clip_norm=1e6)
    with torch.inference_mode():
        out = step.accumulate(params, step.init(params, random.key(0)), [(torch.ones(6, 3), None)])
    torch.testing.assert_close(out.params, torch.full((3,), -0.5))


def test_a_torch_optimizer_takes_what_is_released():
    """Catches: gradients of a dtype or sign that torch.optim cannot take; a state that stands still."""
    params, batch = make_data(300, torch.float32)
    ours, theirs = make_step(optimizer=optim.adam(1e-2)), {name: leaf.clone() for name, leaf in params.items()}
    optimizer = torch.optim.Adam(theirs.values(), lr=1e-2)
    state = other = ours.init(params, random.key(0))
    for _ in range(3):
        grads, other, _ = ours.release(theirs, other, cut(batch, [100, 100, 100]))
        for name, param in theirs.items():
            param.grad = grads[name]
        optimizer.step()
        params, state, _ = ours.accumulate(params, state, cut(batch, [150, 150]))
    torch.testing.assert_close(theirs, params, rtol=1e-3, atol=1e-4)
    assert (other.step, other.ledger) == (state.step, state.ledger)


def test_half_a_batch_is_saved_and_goes_on():
    """Catches: sums that torch.load refuses by default."""
    params, batch = make_data(24)
    clipped = pegrad.clipped_grad(loss, clip_norm=CLIP)
    first, second = cut(batch, [10, 14])
    file = io.BytesIO()
    torch.save(clipped.add(clipped.init(params), params, *first).sums, file)
    file.seek(0)
    sums = clipped.add(torch.load(file), params, *second).sums
    torch.testing.assert_close(clipped.finish(sums), clipped(params, batch).grads)
