"""`explain`: what it prints is what runs, and it prints within bounds."""

import pytest
import torch
import torch.nn.functional as F

import pegrad
from cases import CASES
from pegrad.clipping import PerLayer, PerLeaf
from pegrad.rules.conv.site import ConvWeight
from pegrad.rules.embedding import EmbeddingWeight
from pegrad.rules.linear import LinearWeight

STRATEGIES = ["ghost", "book_keeping", "auto"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def ran(monkeypatch):
    """Notes, for each kernel that a weight's site runs, how it was offered and its name."""
    log = []

    def watch(cls, offer):
        offered = getattr(cls, offer)

        def noting(self, x, g):
            kernels = offered(self, x, g)
            named = kernels if isinstance(kernels, dict) else {"native": kernels}
            named = {name: kernel._replace(run=note(self, offer, name, kernel.run)) for name, kernel in named.items()}
            return named if isinstance(kernels, dict) else named["native"]

        monkeypatch.setattr(cls, offer, noting)

    def note(site, offer, name, run):
        def noted(x, g):
            log.append((site.operation, offer, name))
            return run(x, g)

        return noted

    for cls in (LinearWeight, EmbeddingWeight, ConvWeight):
        for offer in ("stacking", "norming", "summing"):
            watch(cls, offer)
    return log


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "name",
    [
        "weight_norm",
        "weight_standardisation",
        "tied_embedding",
        "recurrence",
        "attention",
        "linear_over_positions",
        "convolutions_with_in_place_activation",
        "one_convolution_at_two_sizes",
    ],
)
def test_what_it_prints_is_what_runs(name, strategy, ran):
    """Catches: `contract` printed where the native sum runs, as for normalised weights; a kernel that is not run."""
    loss, (params, batch) = CASES[name].loss, CASES[name].make()
    explanation = pegrad.explain(loss, params, batch, strategy=strategy)
    assert not ran
    pegrad.clipped_grad(loss, clip_norm=1e-3, strategy=strategy)(params, batch)
    weights = [use for use in explanation.uses if use.candidates and any(use.operation == op for op, *_ in ran)]
    assert weights
    norms = {(use.operation, use.norm) for use in weights}
    assert norms == {(op, kernel) for op, offer, kernel in ran if offer != "summing"}
    native = {use.operation for use in weights if use.sum == "native"}
    assert native == {op for op, offer, _ in ran if offer == "summing"}


def test_a_parameter_made_of_others_is_stacked_by_the_estimate_whatever_was_measured():
    """Catches: measured times shown for a choice that they have no part in."""
    loss, (params, batch) = CASES["weight_standardisation"].loss, CASES["weight_standardisation"].make()
    plain = pegrad.explain(loss, params, batch)
    tuned = pegrad.autotune(loss, params, batch, repeats=1)
    slow = {key: 1e12 if any(key.endswith(use.norm) for use in plain.uses) else 1.0 for key in tuned.timings}
    rigged = pegrad.explain(loss, params, batch, strategy=pegrad.BookKeeping(timings=slow))
    made = [(a.norm, b.norm) for a, b in zip(plain.uses, rigged.uses, strict=True) if a.why == "made of parameters"]
    assert made
    assert all(a == b for a, b in made)


def test_uses_of_one_parameter_are_measured_and_chosen_for_together():
    """Catches: measured times of one use taken for those of all."""
    loss, (params, batch) = CASES["one_convolution_at_two_sizes"].loss, CASES["one_convolution_at_two_sizes"].make()
    plain = pegrad.explain(loss, params, batch)
    assert {use.why for use in plain.uses} >= {"2 uses as one"}
    tuned = pegrad.autotune(loss, params, batch, repeats=1)
    slow = {key: 1e12 if any(key.endswith(use.norm) for use in plain.uses) else 1.0 for key in tuned.timings}
    rigged = pegrad.explain(loss, params, batch, strategy=pegrad.BookKeeping(timings=slow))
    assert [use.norm for use in rigged.uses] != [use.norm for use in plain.uses]


def test_what_ghost_keeps():
    """Catches: book-keeping's numbers shown for a strategy that keeps nothing."""
    loss, (params, batch) = CASES["tied_embedding"].loss, CASES["tied_embedding"].make()
    assert all(use.numbers == 0 for use in pegrad.explain(loss, params, batch, strategy="ghost").uses)
    kept = {use.operation: use.numbers for use in pegrad.explain(loss, params, batch).uses}
    assert kept["embedding"] > 0
    assert kept["linear"] > 0


def test_a_copy_that_a_rule_makes_is_not_nameless():
    """Catches: "no rule for", and nothing after it."""
    params = {"w": r(4, 5), "b": r(5)}
    (_, copied) = pegrad.explain(lambda p, x: torch.addmm(p["b"], x, p["w"]).sum(), params, r(5, 3, 4)).uses
    assert copied.leaves == "params['b']"
    assert copied.operation
    assert not copied.why.endswith("for ")


def test_leaves_that_are_copied_for_a_second_run_are_shown():
    """Catches: a first run explained where a second one counts."""

    class Scale(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(w):
            return w * 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g * 2

    (use,) = pegrad.explain(lambda p, x: F.linear(x, Scale.apply(p)).sum(), r(3, 4), r(5, 4)).uses
    assert (use.norm, use.operation) == ("copies", "(all)")


def test_a_use_without_effect_is_not_used():
    """Catches: a kernel shown that never runs."""
    params = {"w": r(3, 4), "v": r(3, 4)}
    explanation = pegrad.explain(
        lambda p, x: F.linear(x, p["w"]).sum() + F.linear(x, p["v"]).detach().sum(), params, r(5, 4)
    )
    assert [use.leaves for use in explanation.uses] == ["params['w']"]
    assert explanation.unused == ("params['v']",)


class TestText:
    @pytest.mark.parametrize("name", [*CASES])
    def test_it_fits_120_columns(self, name):
        explanation = pegrad.explain(CASES[name].loss, *CASES[name].make())
        lines = str(explanation).splitlines()
        assert max(map(len, lines)) <= 120
        assert all(use.leaves in str(explanation) for use in explanation.uses)

    def test_it_fits_120_columns_whatever_the_names_and_shapes(self):
        """Catches: a bound that only short names keep."""
        name = "a_parameter_with_" + "a_very_" * 20 + "long_name"
        params = {name: r(4, 3, 1, 1, 1)}
        explanation = pegrad.explain(lambda p, x: F.conv3d(x, p[name]).sum(), params, r(5, 2, 3, 11, 101, 10))
        lines = str(explanation).splitlines()
        assert max(map(len, lines)) <= 120
        assert name in "".join(lines)

    def test_equal_uses_are_one_row_with_a_count(self):
        """Catches: a row for each step of a recurrence."""
        explanation = pegrad.explain(CASES["recurrence"].loss, *CASES["recurrence"].make())
        assert len(explanation.uses) == 11
        lines = str(explanation).splitlines()
        assert len(lines) == 2 + 3
        assert sum("linear (5 times)" in line for line in lines) == 2
        assert explanation._repr_html_().count("<tr>") == 1 + 3

    def test_it_shows_the_next_best_way_alone(self):
        explanation = pegrad.explain(CASES["module"].loss, *CASES["module"].make())
        assert all(line.count(" ms") <= 2 for line in str(explanation).splitlines())


def test_groups_are_shown_where_there_are_several():
    """Catches: a plan printed that is not the one that runs, where a parameter is made of leaves of two groups."""

    def loss(params, x):
        x = F.linear(x, params["a"]["w"] * params["scale"], params["a"]["b"]).tanh()
        return F.linear(x, params["b"]["w"]).sum()

    params = {"a": {"w": r(6, 4), "b": r(6)}, "b": {"w": r(5, 6)}, "scale": r(6, 1)}
    flat, layers = (pegrad.explain(loss, params, r(3, 4), clip_norm=clip_norm) for clip_norm in (1.0, PerLayer(1.0)))
    assert "(group" not in str(flat)
    assert "params['b']['w'] (group params['b'])" in str(layers)
    assert [use.group for use in layers.uses] == ["params['a'], params['scale']", "params['a']", "params['b']"]
    assert [use.why for use in flat.uses][:2] == ["made of parameters", ""]
    assert [use.why for use in layers.uses][:2] == ["shares a leaf", ""]
    assert all(
        len(line) <= 120 for line in str(pegrad.explain(loss, params, r(3, 4), clip_norm=PerLeaf(1.0))).splitlines()
    )
