"""Inner products, moments and noise scale against the oracle's stacked gradients."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import hostile
import oracle
import pegrad
from cases import CASES, r
from pegrad import trees

STRATEGIES = [*pegrad.STRATEGIES]
TRACED = ["ghost", "book_keeping", "auto"]
B = 7
MASKS = {
    "no mask": None,
    "scattered": [True, False, True, True, False, True, True],
    "a whole micro-batch of padding": [False, False, False, True, True, True, False],
}
SIZES = [None, 1, 3]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
every_size = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=CASES)
def problem(request):
    case = CASES[request.param]
    params, batch = case.make()
    grads = oracle.per_example_grads(case.loss, params, batch)
    return case.loss, params, batch, grads


def flat(grads):
    return torch.cat([g.reshape(g.shape[0], -1) for g in grads], 1)


def assert_noise(found, rows):
    """Against McCandlish et al., appendix A.1, with batches of one example and of all."""
    big, small, size = rows.mean(0).square().sum(), rows.square().sum(1).mean(), len(rows)
    squared_norm = (size * big - small) / (size - 1)
    trace = (small - big) / (1 - 1 / size)
    scale = trace / squared_norm if squared_norm > 0 else torch.tensor(math.inf).double()
    torch.testing.assert_close(found, pegrad.NoiseScale(scale, trace, squared_norm), rtol=1e-9, atol=0)


def test_dots(problem):
    """Catches: a site's directional output that forgets groups, padding rows or another use of the leaf."""
    loss, params, batch, grads = problem
    direction = trees.map(torch.randn_like, params)
    dots = pegrad.per_example_dot(loss)(params, batch, direction)
    vector = torch.cat([leaf.flatten() for leaf in trees.leaves(direction)])
    oracle.assert_close(dots, [flat(grads) @ vector])


def test_gram(problem):
    """Catches: cross terms between uses of one leaf left out; a matrix that is right on its diagonal only."""
    loss, params, batch, grads = problem
    oracle.assert_close(pegrad.gradient_gram(loss)(params, batch), [flat(grads) @ flat(grads).T])


def test_gram_of_two_batches(problem):
    """Catches: the block of one batch with itself; a transposed block."""
    loss, params, batch, grads = problem
    gram = pegrad.gradient_gram(loss)
    some = trees.map(lambda leaf: leaf[:2], batch)
    oracle.assert_close(gram(params, some, batch), [flat(grads)[:2] @ flat(grads).T])
    oracle.assert_close(gram(params, batch, some), [flat(grads) @ flat(grads)[:2].T])


def test_moments(problem):
    """Catches: division by B in place of B - 1; a leaf shown before its last use came in."""
    loss, params, batch, grads = problem
    moments = pegrad.gradient_moments(loss)(params, batch)
    oracle.assert_close(moments.mean, [g.mean(0) for g in grads])
    oracle.assert_close(moments.variance, [g.var(0) for g in grads])


def test_noise_scale(problem):
    """Catches: biased estimates; the noise scale of one leaf only."""
    loss, params, batch, grads = problem
    assert_noise(pegrad.gradient_noise_scale(loss)(params, batch), flat(grads))


# Strategies, masks, micro-batches


def network(params, example):
    x, tokens = example
    h = F.linear(x, params["w"], params["b"]).tanh()
    y = F.conv1d(h.T[None], params["k"], padding=1)[0].sin() * params["gain"]
    return y.sum() + (F.embedding(tokens, params["table"]) @ params["table"].T).tanh().sum()


def branching(params, example):
    """Two paths, one of which leaves a leaf out."""
    x, tokens = example
    h = F.linear(x, params["w"], params["b"])
    rest = F.embedding(tokens, params["table"]).sin().sum() + (params["gain"] * params["k"].sum()).sum()
    return rest + (h.sin().sum() if x.sum() > 0 else (params["w"] * x[:1]).cos().sum())


def hooked(params, example):
    """What only the loop can run."""
    x, tokens = example
    y = F.linear(x, params["w"], params["b"])
    y.register_hook(lambda g: 2 * g)
    return y.sin().sum() + F.embedding(tokens, params["table"]).sin().sum() + params["k"].sum() * params["gain"].sum()


def make(size=B):
    params = {"w": r(4, 3), "b": r(4), "k": r(2, 4, 3), "gain": r(2, 1), "table": r(5, 3)}
    return params, (r(size, 6, 3), torch.randint(5, (size, 4)))


def spoilt(batch, mask):
    """Padding as it may be: not finite."""
    x, tokens = batch
    return (x if mask is None else x.masked_fill(~torch.tensor(mask)[:, None, None], math.nan)), tokens


def assert_statistics(loss, strategy, mask, size):
    params, batch = make()
    kept = torch.ones(B, dtype=torch.bool) if mask is None else torch.tensor(mask)
    mask = None if mask is None else kept
    grads = [g * kept.reshape(-1, *[1] * (g.dim() - 1)) for g in oracle.per_example_grads(loss, params, batch)]
    rows = flat([grads[sorted(params).index(name)] for name in sorted(params)])
    given = spoilt(batch, None if mask is None else kept.tolist()) if loss is not branching else batch
    options = {"strategy": strategy, "microbatch_size": size}
    direction = trees.map(torch.randn_like, params)
    vector = torch.cat([leaf.flatten() for leaf in trees.leaves(direction)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pegrad.FallbackWarning)
        oracle.assert_close(pegrad.per_example_dot(loss, **options)(params, given, direction, mask), [rows @ vector])
        gram = pegrad.gradient_gram(loss, **options)
        oracle.assert_close(gram(params, given, mask=mask), [rows @ rows.T])
        first, last = (trees.map(lambda leaf, part=part: leaf[part], given) for part in (slice(0, 4), slice(4, None)))
        masks = {} if mask is None else {"mask": mask[:4], "other_mask": mask[4:]}
        oracle.assert_close(gram(params, first, last, **masks), [rows[:4] @ rows[4:].T])
        if mask is not None:  # padding on one side only
            cross = gram(params, first, trees.map(lambda leaf: leaf[4:], batch), mask=mask[:4])
            whole = flat(oracle.per_example_grads(loss, params, batch))
            oracle.assert_close(cross, [rows[:4] @ whole[4:].T])
        moments = pegrad.gradient_moments(loss, **options)(params, given, mask)
        oracle.assert_close(moments.mean, [g[kept].mean(0) for g in grads])
        oracle.assert_close(moments.variance, [g[kept].var(0) for g in grads])
        assert_noise(pegrad.gradient_noise_scale(loss, **options)(params, given, mask), rows[kept])


@every_size
@every_mask
@every_strategy
def test_every_strategy_mask_and_micro_batch(strategy, mask, size):
    """Catches: padding that is counted, or that spoils what it meets; micro-batches joined as if of one size."""
    assert_statistics(network, strategy, mask, size)


@pytest.mark.parametrize("loss", [branching, hooked])
@every_size
@every_mask
def test_paths_and_the_loop(loss, mask, size):
    """Catches: a statistic of one path's examples; a mask that is lost where the loop steps in."""
    assert_statistics(loss, "auto", mask, size)


@pytest.mark.parametrize("strategy", ["auto", "grouped_conv", "vmap", "naive"])
def test_under_a_transform(strategy):
    """Catches: `auto` that traces where only a transform composes; a constant in place of a derivative."""
    x = r(B, 3)

    def loss(params, x):
        return (params * x).sin().sum()

    def rows(params):
        return x * (params * x).cos()

    params, direction = r(3), r(3)
    mask = torch.tensor(MASKS["scattered"])
    statistics = {
        "dots": (
            lambda p: pegrad.per_example_dot(loss, strategy=strategy)(p, x, direction).square().sum(),
            lambda p: (rows(p) @ direction).square().sum(),
        ),
        "gram": (
            lambda p: pegrad.gradient_gram(loss, strategy=strategy, microbatch_size=4)(p, x).sin().sum(),
            lambda p: (rows(p) @ rows(p).T).sin().sum(),
        ),
        "moments": (
            lambda p: pegrad.gradient_moments(loss, strategy=strategy, microbatch_size=4)(p, x, mask).variance.sum(),
            lambda p: rows(p)[mask].var(0).sum(),
        ),
        "noise": (
            lambda p: pegrad.gradient_noise_scale(loss, strategy=strategy, microbatch_size=4)(p, x, mask).trace,
            lambda p: rows(p)[mask].var(0).sum(),
        ),
    }
    for name, (ours, expected) in statistics.items():
        torch.testing.assert_close(torch.func.grad(ours)(params), torch.func.grad(expected)(params), msg=name)
        several = torch.stack([params, 2 * params])
        torch.testing.assert_close(torch.func.vmap(ours)(several), torch.stack([expected(p) for p in several]))


# Rounding


@pytest.mark.parametrize("strategy", TRACED)
def test_products_of_terms_that_cancel(strategy):
    """Catches: a Gram matrix with a negative diagonal, for a short gradient is a difference of large products."""
    x, g = torch.rand(4, 2, 16), torch.rand(4, 2, 16)
    x[0, 1], g[0] = 3 * x[0, 0], 1e4 * torch.tensor([[3.0], [-1.0]])
    gram = pegrad.gradient_gram(hostile.bilinear, strategy=strategy)(torch.zeros(16, 16), (x, g))
    rows = flat(oracle.per_example_grads(hostile.bilinear, torch.zeros(16, 16), (x, g)))
    assert rows[0].norm() < 1
    assert (gram - rows @ rows.T).abs().max() <= 1e-5 * (rows @ rows.T).max()


@pytest.mark.parametrize("strategy", TRACED)
def test_dots_of_terms_that_cancel(strategy):
    """Catches: positions added up in float32."""
    x, g = torch.ones(1, 3, 1), torch.tensor([[[1e7], [1 / 3], [-1e7]]])
    dots = pegrad.per_example_dot(hostile.bilinear, strategy=strategy)(torch.zeros(1, 1), (x, g), torch.ones(1, 1))
    torch.testing.assert_close(dots, torch.tensor([1 / 3]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leaves_that_cancel(strategy):
    """Catches: a total kept in float32, in which what one leaf adds and another takes away swallows the third."""

    def loss(params, x):
        return 3e4 * (params["a"] * x).sum() + (params["b"] * x).sum() + 1e4 * (params["c"] * x).sum()

    params = {name: torch.zeros(2) for name in "abc"}
    batch = torch.tensor([[1.0, 1 / 3], [-3.0, 1 / 7]])
    direction = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([-3.0, 0.0])}
    dots = pegrad.per_example_dot(loss, strategy=strategy)(params, batch, direction)
    torch.testing.assert_close(dots, batch[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_products_of_leaves_that_cancel(strategy):
    """Catches: the same of a Gram matrix, whose parts may be float32."""

    def loss(params, g):
        return sum((F.linear(torch.ones_like(g[name]), params[name]) * g[name]).sum() for name in "abc")

    params = {name: torch.zeros(2, 2) for name in "abc"}
    one = {"a": torch.full((1, 2), 1e4), "b": torch.full((1, 2), 1 / 3), "c": torch.full((1, 2), -1e4)}
    two = {"a": torch.full((1, 2), 1e4), "b": torch.ones(1, 2), "c": torch.full((1, 2), 1e4)}
    torch.testing.assert_close(pegrad.gradient_gram(loss, strategy=strategy)(params, one, two), torch.tensor([[4 / 3]]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_numbers(strategy):
    """Catches: products of a long leaf added naively in float32."""

    def loss(params, x):
        return (params * x.expand(len(params))).sum()

    params, batch = torch.zeros(1 << 22), torch.full((2, 1), 1 / 3)
    third = float(batch[0])
    gram = pegrad.gradient_gram(loss, strategy=strategy)(params, batch)
    assert (gram.double() / (third**2 * len(params)) - 1).abs().max() < 1e-5
    dots = pegrad.per_example_dot(loss, strategy=strategy)(params, batch, torch.full_like(params, third))
    assert (dots.double() / (third**2 * len(params)) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@every_strategy
def test_dtypes(strategy, dtype):
    """Catches: a total in the dtype of the loss, where that is narrower than float32 or than the parameters."""

    def loss(params, x):
        return F.linear(x, params["w"]).sum().to(torch.bfloat16) + (params["b"] * x).sum().to(torch.bfloat16)

    params = {"w": r(2, 3).to(dtype), "b": r(3).to(dtype)}
    batch = r(9, 3).to(dtype)
    grads = [batch.double(), batch.double()[:, None].expand(9, 2, 3)]
    wide = torch.promote_types(dtype, torch.float32)
    options = {"strategy": strategy, "microbatch_size": 4}
    found = [
        pegrad.gradient_gram(loss, **options)(params, batch),
        pegrad.per_example_dot(loss, **options)(params, batch, params),
        *trees.leaves(pegrad.gradient_moments(loss, **options)(params, batch)),
    ]
    along = torch.cat([params["b"], params["w"].flatten()]).double()
    expected = [flat(grads) @ flat(grads).T, flat(grads) @ along, *(g.mean(0) for g in grads)]
    expected += [g.var(0) for g in grads]
    assert {t.dtype for t in found} == {wide}
    oracle.assert_close(found, [t.double() for t in expected], 1e-5)


@pytest.mark.parametrize("shift", [1e3, 1e6])
@pytest.mark.parametrize("size", [None, 1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mean_does_not_drown_the_variance(size, shift, dtype):
    """Catches: variance as a difference of sums of squares, of which a large mean leaves nothing."""

    def loss(params, x):
        return (params * x).sum()

    batch = (shift + torch.randn(300, 2, dtype=torch.float64)).to(dtype)
    params = torch.zeros(2, dtype=dtype)
    moments = pegrad.gradient_moments(loss, microbatch_size=size)(params, batch)
    torch.testing.assert_close(moments.variance, batch.double().var(0).to(dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.mean, batch.double().mean(0).to(dtype), rtol=1e-6, atol=0)


def test_variances_of_one_and_of_equal_examples():
    """Catches: zero where there is no estimate; a negative variance."""

    def loss(params, x):
        return (params * x).sum()

    one = torch.full((1, 3), 0.1)
    assert pegrad.gradient_moments(loss)(torch.zeros(3), one).variance.isnan().all()
    for size in (None, 2):
        equal = one.expand(301, 3)
        assert (pegrad.gradient_moments(loss, microbatch_size=size)(torch.zeros(3), equal).variance < 1e-15).all()
        noise = pegrad.gradient_noise_scale(loss, microbatch_size=size)(torch.zeros(3), equal)
        assert 0 <= noise.scale < 1e-5


def test_noise_of_a_gradient_that_is_not_finite():
    """Catches: an infinite scale, or a finite one, where nothing is known."""
    batch = torch.tensor([[1.0], [2.0], [math.nan]])
    noise = pegrad.gradient_noise_scale(lambda p, x: (p * x).sum())(torch.ones(1), batch)
    assert all(part.isnan() for part in noise)


def test_noise_averages_to_the_truth():
    """Catches: an estimate that is biased: of small batches, the averages would be off by half."""
    torch.manual_seed(0)
    batches = 1 + torch.randn(4000, 2, 5, dtype=torch.float64)
    scale = pegrad.gradient_noise_scale(lambda p, x: (p * x).sum(), strategy="vmap")
    noise = torch.func.vmap(lambda batch: scale(torch.zeros(5).double(), batch))(batches)
    assert noise.trace.mean() == pytest.approx(5, rel=0.03)
    assert noise.squared_norm.mean() == pytest.approx(5, rel=0.05)


def test_errors():
    def loss(params, x):
        return (params * x).sum()

    one, none = torch.ones(1, 3), torch.ones(0, 3)
    with pytest.raises(pegrad.ArgumentError, match="at least 2 examples, got 1"):
        pegrad.gradient_noise_scale(loss)(torch.ones(3), one)
    with pytest.raises(pegrad.ArgumentError, match="at least 1 examples, got 0"):
        pegrad.gradient_moments(loss)(torch.ones(3), none)
    with pytest.raises(pegrad.LeafError, match="direction differs from params in structure"):
        pegrad.per_example_dot(loss)(torch.ones(3), one, [torch.ones(3)])
    assert pegrad.gradient_gram(loss)(torch.ones(3), none).shape == (0, 0)
    assert pegrad.gradient_gram(loss)(torch.ones(3), none, one).shape == (0, 1)
    assert pegrad.gradient_gram(loss)(torch.ones(3), one, none).shape == (1, 0)
    assert pegrad.per_example_dot(loss)(torch.ones(3), none, torch.ones(3)).shape == (0,)


def test_errors_name_the_leaf():
    """Catches: a message that leaves the search to the reader, or a bare AttributeError."""

    def loss(params, example):
        return (params["a"] * example["x"]).sum()

    params, batch = {"a": torch.ones(3)}, {"x": torch.ones(2, 3)}
    dot, gram = pegrad.per_example_dot(loss), pegrad.gradient_gram(loss)
    with pytest.raises(pegrad.LeafError, match=r"direction\['a'\] has shape \(4,\): expected a tensor of shape \(3,\)"):
        dot(params, batch, {"a": torch.ones(4)})
    with pytest.raises(pegrad.LeafError, match=r"direction\['a'\] is a float"):
        dot(params, batch, {"a": 1.0})
    with pytest.raises(pegrad.LeafError, match=r"other\['x'\] has examples of shape \(4,\)"):
        gram(params, batch, {"x": torch.ones(2, 4)})
    with pytest.raises(pegrad.LeafError, match=r"other\['x'\] .* dtype torch.float64"):
        gram(params, batch, {"x": torch.ones(2, 3).double()})
    with pytest.raises(pegrad.LeafError, match=r"other differs from batch in structure.*mask="):
        gram(params, batch, torch.ones(2, dtype=torch.bool))
    with pytest.raises(pegrad.ArgumentError, match="other_mask to be None"):
        gram(params, batch, other_mask=torch.ones(2, dtype=torch.bool))
    for function in (
        pegrad.per_example_dot,
        pegrad.gradient_gram,
        pegrad.gradient_moments,
        pegrad.gradient_noise_scale,
    ):
        with pytest.raises(pegrad.ArgumentError, match="microbatch_size=0"):
            function(loss, microbatch_size=0)
