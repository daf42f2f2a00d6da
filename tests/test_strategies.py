"""Every strategy against the oracle, over every way a parameter can meet an operation."""

import optree
import pytest
import torch

import oracle
import pegrad
from cases import CASES, B

# PyTorch's own batching rule for attention is a loop on a CPU, and says so under strategies that rely on it.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

STRATEGIES = [*pegrad.STRATEGIES]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
class TestAgainstTheOracle:
    """Catches: a contribution dropped, doubled or put on the wrong leaf or row, by any strategy in any case."""

    def test_stacked_gradients(self, name, strategy):
        loss, (params, batch) = CASES[name].loss, CASES[name].make()
        grads = pegrad.per_example_grad(loss, strategy=strategy)(params, batch)
        oracle.assert_close(grads, oracle.per_example_grads(loss, params, batch))
        assert optree.tree_structure(grads, namespace="pegrad") == optree.tree_structure(params, namespace="pegrad")

    def test_norms(self, name, strategy):
        loss, (params, batch) = CASES[name].loss, CASES[name].make()
        norms = pegrad.per_example_norm(loss, strategy=strategy)(params, batch)
        oracle.assert_close(norms, [oracle.norms(oracle.per_example_grads(loss, params, batch))])

    def test_clipped_sum_with_some_clipped_and_some_not(self, name, strategy):
        loss, (params, batch) = CASES[name].loss, CASES[name].make()
        grads = oracle.per_example_grads(loss, params, batch)
        clip_norm = oracle.norms(grads).median().item()
        out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy, normalize_by=3.0)(params, batch)
        oracle.assert_close(out.grads, [g / 3 for g in oracle.clipped_sum(grads, clip_norm)])
        oracle.assert_close(out.norms, [oracle.norms(grads)])
        assert out.losses.shape == (B,)
        assert out.non_finite == 0

    def test_masked_rows_are_as_if_absent(self, name, strategy):
        loss, (params, batch) = CASES[name].loss, CASES[name].make()
        mask = torch.tensor([True, False, True, True, False])
        kept = oracle.per_example_grads(loss, params, optree.tree_map(lambda t: t[mask], batch, namespace="pegrad"))
        out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(params, batch, mask)
        oracle.assert_close(out.grads, oracle.clipped_sum(kept, 0.5))
        assert (out.norms[~mask] == 0).all()
        assert (out.losses[~mask] == 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [0, 1])
def test_the_smallest_batches(name, strategy, size):
    """Catches: a batch axis squeezed away, `groups = 0`, a reduction over an empty axis."""
    loss, (params, batch) = CASES[name].loss, CASES[name].make()
    batch = optree.tree_map(lambda t: t[:size], batch, namespace="pegrad")
    grads = pegrad.per_example_grad(loss, strategy=strategy)(params, batch)
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    if size:
        expected = oracle.per_example_grads(loss, params, batch)
        oracle.assert_close(grads, expected)
        oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))
    else:
        for leaf, grad, total in zip(*map(_leaves, (params, grads, out.grads)), strict=True):
            assert grad.shape == (0, *leaf.shape)
            assert total.shape == leaf.shape
            assert (total == 0).all()
    assert out.losses.shape == out.norms.shape == (size,)
    for leaf in _leaves(out.aux):
        assert leaf.shape[0] == size


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_chunks_and_microbatches_change_nothing(strategy, size):
    """Catches: a last, shorter chunk lost or counted twice; a mask not cut along with its rows."""
    loss, (params, batch) = CASES["module"].loss, CASES["module"].make()
    mask = torch.tensor([True, True, False, True, True])
    expected = oracle.per_example_grads(loss, params, batch)
    expected = [g.masked_fill(~mask.reshape(-1, *[1] * (g.dim() - 1)), 0) for g in expected]
    grads = pegrad.per_example_grad(loss, strategy=strategy, microbatch_size=size)(params, batch, mask)
    oracle.assert_close(grads, expected)
    norms = pegrad.per_example_norm(loss, strategy=strategy, microbatch_size=size)(params, batch, mask)
    oracle.assert_close(norms, [oracle.norms(expected)])
    out = pegrad.clipped_grad(loss, clip_norm=0.1, strategy=strategy, microbatch_size=size)(params, batch, mask)
    oracle.assert_close(out.grads, oracle.clipped_sum([g[mask] for g in expected], 0.1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_and_aux_come_back_by_example(strategy):
    """Catches: aux summed, transposed, or returned for the last example only."""
    loss, (params, batch) = CASES["mlp_in_a_nested_tree"].loss, CASES["mlp_in_a_nested_tree"].make()
    out = pegrad.per_example_value_and_grad(loss, strategy=strategy, microbatch_size=2)(params, batch)
    clipped = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy, microbatch_size=2)(params, batch)
    expected = [loss(params, x) for x in batch]
    for got in (out, clipped):
        oracle.assert_close(got.losses, [torch.stack([value for value, _ in expected])])
        oracle.assert_close(got.aux["hidden"], [torch.stack([aux["hidden"] for _, aux in expected])])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["module", "tied_embedding", "attention"])
def test_float32_keeps_its_dtype_and_its_accuracy(name, strategy):
    """Catches: a float64 constant that promotes, a reduction in too few bits."""
    loss, (params, batch) = CASES[name].loss, CASES[name].make()
    expected = oracle.per_example_grads(loss, params, batch)
    single = _cast((params, batch), torch.float32)
    if name == "module":
        loss = _module_in(torch.float32)
    grads = pegrad.per_example_grad(loss, strategy=strategy)(*single)
    assert all(leaf.dtype == torch.float32 for leaf in _leaves(grads))
    oracle.assert_close(_cast(grads, torch.float64), expected, relative=1e-4)
    out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(*single)
    assert {leaf.dtype for leaf in _leaves(out.grads)} == {out.norms.dtype} == {torch.float32}
    oracle.assert_close(_cast(out.grads, torch.float64), oracle.clipped_sum(expected, 0.5), relative=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["matmul_plus_bias", "linear_over_positions", "one_convolution_at_two_sizes"])
def test_bfloat16_keeps_its_norms_and_sums_in_float32(name, strategy):
    """Catches: norms or sums accumulated in eight bits of precision."""
    loss, (params, batch) = CASES[name].loss, CASES[name].make()
    half = _cast((params, batch), torch.bfloat16)
    expected = oracle.per_example_grads(loss, *half)
    out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(*half)
    assert {leaf.dtype for leaf in _leaves(out.grads)} == {out.norms.dtype} == {torch.float32}
    oracle.assert_close(out.norms.double(), [oracle.norms(expected)], relative=0.1)
    grads = pegrad.per_example_grad(loss, strategy=strategy)(*half)
    exact = oracle.norms([leaf.double() for leaf in _leaves(grads)])
    norms = pegrad.per_example_norm(loss, strategy=strategy)(*half)
    oracle.assert_close(norms.double(), [exact], relative=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_changing_one_example_leaves_the_other_rows_bitwise_as_they_were(strategy):
    """Catches: any coupling of examples, such as a statistic taken over the batch."""
    loss, (params, batch) = CASES["module"].loss, CASES["module"].make()
    changed = (batch[0].clone(), batch[1])
    changed[0][2] = torch.randn_like(changed[0][2]) * 100
    others = torch.tensor([0, 1, 3, 4])
    function = pegrad.per_example_grad(loss, strategy=strategy)
    for before, after in zip(_leaves(function(params, batch)), _leaves(function(params, changed)), strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pure(strategy):
    """Catches: an argument written to, or hidden state that makes a second call differ."""
    loss, (params, batch) = CASES["module"].loss, CASES["module"].make()
    before = [leaf.clone() for leaf in _leaves((params, batch))]
    function = pegrad.clipped_grad(loss, clip_norm=0.1, strategy=strategy)
    first, second = function(params, batch), function(params, batch)
    assert all(map(torch.equal, before, _leaves((params, batch))))
    assert all(map(torch.equal, _leaves(first), _leaves(second)))
    assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_use_that_comes_to_nothing(strategy):
    """Catches: a leaf's gradient held back for uses that the loss does not depend on after all."""

    def loss(params, x):
        first = torch.nn.functional.linear(x, params["w"])
        second = torch.nn.functional.linear(first.tanh(), params["w"])
        return (second * 0).detach().sum() + (first * params["b"]).sin().sum(), params["b"] * second

    params = {"w": torch.randn(3, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    batch = torch.randn(B, 4, 3, dtype=torch.float64)
    expected = oracle.per_example_grads(loss, params, batch)
    oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(params, batch), expected)
    oracle.assert_close(pegrad.per_example_norm(loss, strategy=strategy)(params, batch), [oracle.norms(expected)])
    out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_draws_one_mask_for_each_example(strategy):
    """Catches: one mask for the whole batch, or one that the gradient does not see."""

    def loss(params, x):
        kept = torch.nn.functional.dropout(params["w"] * x, 0.5)
        return kept.sum(), kept != 0

    out = pegrad.per_example_value_and_grad(loss, strategy=strategy)({"w": torch.ones(64)}, torch.ones(4, 64))
    assert len({tuple(mask.tolist()) for mask in out.aux}) == 4
    assert torch.equal(out.grads["w"] != 0, out.aux)


def _leaves(tree):
    return optree.tree_leaves(tree, namespace="pegrad")


def _cast(tree, dtype):
    return optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree, namespace="pegrad")


def _module_in(dtype):
    from cases import Net

    net = Net().to(dtype)

    def loss(params, example):
        image, label = example
        logits = torch.func.functional_call(net, params, (image[None],))[0]
        return torch.nn.functional.cross_entropy(logits, label)

    return loss
