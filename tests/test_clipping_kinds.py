"""Every kind of clipping: what it makes of gradients, of the sensitivity, and of what does not fit it."""

import math
from functools import partial

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import pegrad
from cases import CASES
from pegrad.clipping import (
    Automatic,
    ByLabel,
    ByPrefix,
    Flat,
    Grouping,
    Normalised,
    PerLayer,
    PerLeaf,
    Weighted,
    Weights,
)

STRATEGIES = [*pegrad.STRATEGIES]
TRACED = ["ghost", "book_keeping"]
C = 0.3


def concave(norm):
    return torch.where(norm < 1, 1.0, norm.rsqrt())


class Alternating:
    """A clipping of one's own: leaves in turns, which no other clipping would put together."""

    def __init__(self, bounds):
        self.bounds = bounds
        self.sensitivity = math.hypot(*bounds)

    def grouping(self, params):
        leaves = len(optree.tree_leaves(params, namespace=oracle.NAMESPACE))
        groups = min(leaves, len(self.bounds))
        of = tuple(leaf % groups for leaf in range(leaves))
        return Grouping(of, tuple(map(Flat, self.bounds[:groups])), tuple(map(str, range(groups))))


KINDS = {
    "flat": (Flat(C), lambda c, n: (c / n).clamp(max=1)),
    "per leaf": (PerLeaf(C), lambda c, n: (c / n).clamp(max=1)),
    "per layer": (PerLayer(C), lambda c, n: (c / n).clamp(max=1)),
    "in turns": (Alternating((0.2, 0.4)), lambda c, n: (c / n).clamp(max=1)),
    "automatic": (Automatic(C), lambda c, n: c / (n + 0.01)),
    "automatic, per layer": (PerLayer(C, 1, partial(Automatic, gamma=0.1)), lambda c, n: c / (n + 0.1)),
    "normalised": (Normalised(C), lambda c, n: c / n.clamp(min=1e-9)),
    "normalised, per leaf": (PerLeaf(C, Normalised), lambda c, n: c / n.clamp(min=1e-9)),
    "weighted": (Weighted(concave, C), lambda c, n: torch.minimum(concave(n), c / n)),
}


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_turns(name, strategy):
    """Catches: a tensor made of leaves of two groups measured as one; a leaf of one group weighed by another's norm."""
    torch.manual_seed(0)
    params, batch = CASES[name].make()
    agrees(CASES[name].loss, params, batch, "in turns", strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_in_a_nested_tree", "tied_embedding"])
def test_every_kind(name, kind, strategy):
    """Catches: a weight by another formula than the stated one."""
    torch.manual_seed(0)
    params, batch = CASES[name].make()
    agrees(CASES[name].loss, params, batch, kind, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_and_case(name, kind, strategy):
    """Catches: what the two above leave out of their product."""
    torch.manual_seed(0)
    params, batch = CASES[name].make()
    agrees(CASES[name].loss, params, batch, kind, strategy)


def agrees(loss, params, batch, kind, strategy, **options):
    """Compare norms, sum and groups with the oracle."""
    clipping, weight = KINDS[kind]
    grads = oracle.per_example_grads(loss, params, batch)
    grouping = clipping.grouping(params)
    function = pegrad.clipped_grad(loss, clip_norm=clipping, strategy=strategy, **options)
    out = function(params, batch)
    norms = oracle.group_norms(grads, grouping.of)
    bounds = [weighting.bound for weighting in grouping.weightings]
    oracle.assert_close(out.grads, oracle.weighted_sum(grads, grouping.of, lambda g, n: weight(bounds[g], n)), 1e-8)
    expected = norms if grouping.names else norms[0]
    torch.testing.assert_close(out.norms, expected, rtol=1e-8, atol=1e-12)
    alone = pegrad.per_example_norm(loss, by=clipping, strategy=strategy)(params, batch)
    torch.testing.assert_close(alone, expected, rtol=1e-8, atol=1e-12)
    assert len(function.groups(params)) == len(norms)


def layered(params, example):
    """Leaves of three layers: one made of two layers' leaves, one tied to another, one that is not used."""
    x, y = example
    kernel = params["a"]["w"] * params["b"]["scale"][:, None]
    x = F.linear(x, kernel, params["a"]["b"]).tanh()
    x = F.linear(F.linear(x, params["b"]["w"]).tanh(), params["b"]["w"].T)
    return F.cross_entropy(F.linear(x, params["a"]["ww"]), y)


def layers():
    torch.manual_seed(0)
    r = partial(torch.randn, dtype=torch.float64)
    return {
        "a": {"w": r(6, 4), "b": r(6), "ww": r(4, 6)},
        "b": {"scale": r(6), "w": r(5, 6)},
        "unused": {"w": r(3)},
    }, (r(7, 4), torch.arange(7) % 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["per leaf", "per layer", "in turns", "automatic, per layer"])
@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
def test_a_tensor_made_of_leaves_of_two_groups(microbatch_size, kind, strategy):
    """Catches: a norm taken at a source that two groups share; a micro-batch's sum in place of all of them."""
    params, batch = layers()
    agrees(layered, params, batch, kind, strategy, microbatch_size=microbatch_size)


@pytest.mark.parametrize("strategy", ["auto", "book_keeping", "ghost", "naive"])
def test_groups_on_every_path(strategy):
    """Catches: a group that one path does not use taken for complete, or its norms put in another's rows."""

    def loss(params, x):
        if x.sum() > 0:
            return F.linear(x, params["a"]).sin().sum()
        return F.linear(x, params["b"]).square().sum() + params["c"].sum() * x[0]

    torch.manual_seed(0)
    r = partial(torch.randn, dtype=torch.float64)
    params = {"a": r(3, 4), "b": r(2, 4), "c": r(2)}
    agrees(loss, params, r(9, 4), "per leaf", strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("clipping", [PerLayer(C), PerLeaf(C, Normalised), Automatic(C)])
def test_masks_and_empty_batches(clipping, strategy):
    """Catches: padding that is weighed, a divisor that depends on the batch, norms of a row that is not there."""
    params, (x, y) = layers()
    function = pegrad.clipped_grad(layered, clip_norm=clipping, strategy=strategy, normalize_by=7.0)
    mask = torch.tensor([True, False, True, True, False, True, False])
    masked, some = function(params, (x, y), mask), function(params, (x[mask], y[mask]))
    for a, b in zip(optree.tree_leaves(masked.grads), optree.tree_leaves(some.grads), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(masked.norms[..., mask], some.norms)
    assert (masked.norms[..., ~mask] == 0).all()
    empty = function(params, (x[:0], y[:0]))
    assert all((leaf == 0).all() for leaf in optree.tree_leaves(empty.grads))
    assert empty.norms.shape == (*some.norms.shape[:-1], 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_a_row_that_is_not_finite_in_one_group(value, strategy):
    """Catches: NaN times zero; a group spoiled by another's row; an example counted once for each group."""

    def loss(params, example):
        x, z = example
        return (params["a"] * x).sum() + F.linear(z, params["b"]).sum()

    params = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(2, 4, dtype=torch.float64)}
    x, z = torch.ones(5, 3, dtype=torch.float64), torch.ones(5, 4, dtype=torch.float64)
    x[1], z[3] = value, value
    out = pegrad.clipped_grad(loss, clip_norm=PerLeaf(C), strategy=strategy)(params, (x, z))
    assert out.non_finite == 2
    torch.testing.assert_close(out.grads["a"].norm(), torch.tensor(4 * C / 2**0.5, dtype=torch.float64))
    torch.testing.assert_close(out.grads["b"].norm(), torch.tensor(4 * C / 2**0.5, dtype=torch.float64))


@given(
    st.lists(st.floats(0, 1e300) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=8),
    st.floats(1e-6, 1e6),
    st.sampled_from(["large", "negative", "nan", "inverse", "inf"]),
    st.floats(1e-2, 1e2),
)
@settings(deadline=None, derandomize=True)
def test_no_weight_is_above_what_the_bound_allows(squares, clip_norm, how, largest):
    """Catches: a function of the user's that is believed: more than the bound, less than nothing, no number."""
    weight = {
        "large": lambda norm: norm * 0 + 1e9,
        "negative": lambda norm: -1 - norm,
        "nan": lambda norm: norm * math.nan,
        "inverse": lambda norm: 2 * clip_norm / norm,
        "inf": lambda norm: 1 / (norm * 0),
    }[how]
    squared = torch.tensor(squares, dtype=torch.float64)
    mask = torch.arange(len(squares)) != 2
    weighting = Weighted(weight, clip_norm, largest)
    found = Weights.of(weighting, squared, mask)
    assert (found.values >= 0).all()
    assert (found.values <= largest * (1 + 1e-8)).all()
    assert (found.values[~(squared.isfinite() & mask)] == 0).all()
    norms = squared.nan_to_num(0, 0).sqrt()
    assert (found.values * norms <= clip_norm * (1 + 1e-8)).all()
    if how in ("negative", "nan"):
        assert (found.values == 0).all()


def test_a_weighting_of_ones_own_is_held_to_its_bound():
    """Catches: a class with `weights` that is not asked whether it keeps to the bound it states."""

    class Generous(Flat):
        def weights(self, squared_norms, mask):
            return torch.ones_like(squared_norms)

    params, batch = layers()
    for strategy in STRATEGIES:
        given_out, bound = (
            pegrad.clipped_grad(layered, clip_norm=clipping, strategy=strategy, normalize_by=7.0)(params, batch).grads
            for clipping in (PerLayer(C, weighting=Generous), PerLayer(C))
        )
        for a, b in zip(optree.tree_leaves(given_out), optree.tree_leaves(bound), strict=True):
            torch.testing.assert_close(a, b)


def test_a_weight_cannot_see_other_examples():
    """Catches: a function of all norms, by which one example moves the others' shares."""
    clipping = Weighted(lambda norm: 1 / (1 + norm.sum()), 1.0)
    x = torch.rand(4, 3)
    function = pegrad.clipped_grad(lambda p, x: (p * x).sum(), clip_norm=clipping)
    apart = sum(function(torch.zeros(3), x[b : b + 1]).grads for b in range(4))
    torch.testing.assert_close(function(torch.zeros(3), x).grads, apart)
    with pytest.raises(pegrad.ArgumentError, match=r"torch\.where"):
        pegrad.clipped_grad(
            lambda p, x: (p * x).sum(), clip_norm=Weighted(lambda norm: norm if norm < 1 else 1 / norm, 1.0)
        )(torch.zeros(3), x)


def test_a_sensitivity_below_that_of_the_groups_is_refused():
    """Catches: a clipping of one's own that states less than its groups may come to: less noise than is due."""
    clipping = Alternating((3.0, 4.0))
    params, batch = layers()
    assert pegrad.clipped_grad(layered, clip_norm=clipping, normalize_by=2.0).sensitivity == 2.5
    clipping.sensitivity = 4.9
    with pytest.raises(pegrad.ArgumentError, match="at least that of its groups"):
        pegrad.clipped_grad(layered, clip_norm=clipping)(params, batch)


def test_sensitivities_and_names():
    """Catches: a sum of bounds in place of the root of their squares; names in another order than the norms."""
    params, batch = layers()
    for clipping, sensitivity, names in (
        (PerLeaf(C), C, ["params['a']['b']", "params['a']['w']", "params['a']['ww']", "params['b']['scale']"]),
        (PerLayer(C), C, ["params['a']", "params['b']", "params['unused']"]),
        (ByLabel(lambda path: path[-3], {"e": 3.0, "w": 4.0, "b": 12.0}), 13.0, ["e", "w", "b"]),
        (
            ByPrefix({"a": 3.0, "b": {"scale": 4.0, "w": 12.0}, "unused": 84.0}),
            85.0,
            ["params['a']", "params['b']['scale']"],
        ),
        (Automatic(C), C, ["params"]),
    ):
        function = pegrad.clipped_grad(layered, clip_norm=clipping)
        assert function.sensitivity == pytest.approx(sensitivity)
        assert list(function.groups(params)[: len(names)]) == names
        grouping = clipping.grouping(params)
        assert math.hypot(*(w.bound for w in grouping.weightings)) == pytest.approx(sensitivity)
        assert function(params, batch).norms.shape == ((len(grouping.names), 7) if grouping.names else (7,))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (None, ["params['h.0.attn']", "params['h.0.mlp']", "params['h.1.mlp']", "params['top']", "params['x'][0]"]),
        (1, ["params['h']", "params['top']", "params['x']"]),
        (2, ["params['h.0']", "params['h.1']", "params['top']", "params['x'][0]"]),
        (9, ["params['h.0.attn.w']", "params['h.0.mlp.b']", "params['h.0.mlp.w']", "params['h.1.mlp.w']"]),
    ],
)
def test_layers_of_dotted_names(depth, expected):
    """Catches: a module's parameters, one dict of dotted names, taken for as many layers."""
    leaves = ["h.0.attn.w", "h.0.mlp.w", "h.0.mlp.b", "h.1.mlp.w", "top"]
    params = {name: torch.ones(1) for name in leaves} | {"x": [[torch.ones(1), torch.ones(2)]]}
    assert list(PerLayer(1.0, depth).grouping(params).names)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: PerLeaf(0.0), pegrad.ArgumentError, "clip_norm=0"),
        (lambda: PerLeaf("1"), pegrad.ArgumentError, "clip_norm to be a number, got str"),
        (lambda: PerLayer(1.0, 0), pegrad.ArgumentError, "depth=0"),
        (lambda: PerLayer(1.0, 1.5), pegrad.ArgumentError, "depth=1.5"),
        (lambda: PerLayer(1.0, weighting=3), pegrad.ArgumentError, "weighting to be a function"),
        (lambda: PerLayer(1.0, weighting=lambda c: Flat(2 * c)), pegrad.ArgumentError, "weighting of the bound"),
        (lambda: Automatic(1.0, 0.0), pegrad.ArgumentError, "gamma=0"),
        (lambda: Normalised(math.nan), pegrad.ArgumentError, "clip_norm=nan"),
        (lambda: Weighted(1.0, 1.0), pegrad.ArgumentError, "weight to be a function"),
        (lambda: Weighted(abs, 1.0, 0.0), pegrad.ArgumentError, "largest_weight=0"),
        (lambda: Weighted(abs, 1e-5, 1e5), pegrad.ArgumentError, "clip_norm / largest_weight"),
        (lambda: ByLabel({}, {"a": 1.0}), pegrad.ArgumentError, "label to be a function"),
        (lambda: ByLabel(str, {}), pegrad.ArgumentError, "at least one label"),
        (lambda: ByLabel(str, {"a": -1.0}), pegrad.ArgumentError, r"bounds\['a'\]=-1"),
        (lambda: ByPrefix({"a": [1.0, 0.0]}), pegrad.ArgumentError, r"bounds\['a'\]\[1\]=0"),
        (lambda: ByPrefix(None), pegrad.ArgumentError, "at least one bound"),
        (lambda: "automatic", pegrad.ArgumentError, "number or a clipping of pegrad.clipping.*got str"),
        (lambda: Flat, pegrad.ArgumentError, "number or a clipping"),
        (lambda: ByLabel(lambda path: path[2], {"a": 1.0}), pegrad.LeafError, r"params\['b'\]\['scale'\].*no bound"),
        (lambda: ByLabel(lambda path: "x", {"x": 1.0, "y": 1.0}), pegrad.ArgumentError, "No leaf.*'y'"),
        (lambda: ByPrefix({"a": 1.0}), pegrad.LeafError, "not a prefix of that of params.*'b', 'unused'"),
        (lambda: ByPrefix({"a": [1.0], "b": 1.0, "unused": 1.0}), pegrad.LeafError, r"bounds\['a'\]"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, match):
    """Catches: a bound that nobody checks, a leaf that no group holds, noise for a group without leaves."""
    params, batch = layers()
    with pytest.raises(error, match=match):
        pegrad.clipped_grad(layered, clip_norm=make())(params, batch)


def test_bounds_do_not_change_once_given():
    """Catches: a dict that is changed after the sensitivity was read from it."""
    bounds = {"b": 3.0, "w": 4.0, "e": 12.0}
    tree = {"a": 3.0, "b": 4.0, "unused": 12.0}
    by_label, by_prefix = ByLabel(lambda path: path[-3], bounds), ByPrefix(tree)
    bounds["b"] = tree["a"] = 1e6
    params, _ = layers()
    for clipping in (by_label, by_prefix):
        assert clipping.sensitivity == 13.0
        assert math.hypot(*(w.bound for w in clipping.grouping(params).weightings)) == 13.0


def test_a_step_adds_the_noise_of_its_clipping():
    """Catches: noise by one group's bound, or by the clip norm of another kind."""
    params, batch = layers()
    clipping = ByPrefix({"a": 3.0, "b": 4.0, "unused": 12.0})
    step = pegrad.dp_sgd(
        layered, pegrad.optim.sgd(1.0), clip_norm=clipping, noise_multiplier=2.0, expected_batch_size=10.0
    )
    assert step.clipped_grad.sensitivity == pytest.approx(1.3)
    big = {key: dict(value) for key, value in params.items()}
    big["unused"]["w"] = torch.zeros(100_000, dtype=torch.float64)
    new, _, metrics = step(big, step.init(big, pegrad.random.key(0)), batch)
    assert new["unused"]["w"].std() == pytest.approx(2.6, rel=0.02)
    assert metrics.norms.shape == (3, 7)
    torch.testing.assert_close(metrics.whole_norms, pegrad.per_example_norm(layered)(big, batch))
