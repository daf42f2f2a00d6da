"""`pegrad.check`: right strategies pass in every dtype, planted faults are caught and named, and what cannot be
compared is said."""

import math
import random as python_random
from dataclasses import dataclass, replace

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import pegrad
from cases import CASES
from pegrad.clipping import Automatic, Flat, Grouping, Normalised, PerLayer, PerLeaf
from pegrad.reductions.norms import SquaredNorms
from pegrad.rules.bias import Bias, over_leading
from pegrad.rules.costs import Work
from pegrad.rules.gram import Squares
from pegrad.rules.linear import LinearWeight
from pegrad.strategies import Stacking

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

PARAMS = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(3)}
BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cast(tree, dtype):
    return optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree, namespace="pegrad")


def plain(params, x):
    return F.linear(x, params["w"], params["b"]).sin().sum()


class TestNoFalseAlarm:
    """Catches: a tolerance that ordinary rounding or cancellation exceeds."""

    @pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_every_case_under_every_strategy(self, name, strategy, dtype):
        params, batch = cast(CASES[name].make(), dtype)
        report = pegrad.check(CASES[name].loss, params, batch, strategy=strategy, examples=5)
        assert report.dtypes == (("float64",) if dtype == torch.float64 else ("float64", "float32"))
        assert report.left_out == 0
        assert not report.notes
        assert len(report.leaves) == len(pegrad.trees.leaves(params))
        assert {row.verdict for row in (*report.leaves, *report.values)} <= {"same", "not used"}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", CASES)
    def test_every_case_in_half_precision(self, name, dtype):
        params, batch = cast(CASES[name].make(), dtype)
        report = pegrad.check(CASES[name].loss, params, batch, examples=5)
        assert report.dtypes == ("float64", str(dtype).removeprefix("torch."))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_gradients_that_are_zero_but_for_rounding(self, dtype):
        """Catches: errors that are relative to a gradient whose terms cancel, here of a shift of all logits."""

        def loss(params, x):
            return F.cross_entropy(F.linear(x, params["w"], params["b"]) + params["shift"], torch.tensor(1))

        params = cast({**PARAMS, "shift": torch.tensor(3.0)}, dtype)
        pegrad.check(loss, params, BATCH.to(dtype))

    @pytest.mark.parametrize("seed", range(5))
    def test_the_bias_of_keys_whose_gradient_is_zero_but_for_rounding(self, seed):
        """Catches: the same in float64, where no narrower loop tells how large the terms are."""
        torch.manual_seed(seed)

        def loss(params, x):
            keys = F.linear(x, params["w"], params["b"])
            return (torch.softmax(x[:, :3] @ keys.T, 1) @ x).sin().sum()

        pegrad.check(loss, cast(PARAMS, torch.float64), torch.randn(6, 20, 4, dtype=torch.float64))

    def test_norms_and_sums_whose_terms_cancel(self):
        """Catches: an alarm at what the guarantee leaves to rounding, or at a row that the strategy mistrusts."""
        x, g = torch.randn(4, 8, 256) + 1e4 * torch.randn(256), torch.randn(4, 8, 256)
        loss = lambda p, e: (F.linear(e[0], p["w"]) * e[1]).sum()  # noqa: E731
        for strategy in ("ghost", "book_keeping"):
            pegrad.check(loss, {"w": torch.randn(256, 256)}, (x, g - g.mean(1, keepdim=True)), strategy=strategy)
        tokens = torch.tensor([[1, 1], [0, 2], [2, 3], [3, 0]])
        factors = torch.tensor([[1e14, -1e14], [1.0, 1.0], [1.0, 2.0], [0.5, 1.0]])
        loss = lambda p, e: (F.embedding(e[0], p["w"]).sum(1) * e[1]).sum()  # noqa: E731
        report = pegrad.check(loss, {"w": torch.randn(5, 3)}, (tokens, factors), strategy="book_keeping")
        assert any("1 example(s) no weight" in note for note in report.notes)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_value_within_rounding_of_a_kink(self, seed):
        """Catches: a rectifier that opens in the strategy and not in the loop, taken for a wrong gradient."""
        torch.manual_seed(seed)
        x, direction, w = torch.randn(4, 64), torch.randn(4, 8), torch.randn(8, 64)
        w -= torch.linalg.lstsq(x, x @ w.T).solution.T  # every activation is zero but for rounding

        def loss(params, example):
            x, direction = example
            return (F.linear(x, params["w"]).relu() * direction).sum()

        pegrad.check(loss, {"w": w}, (x, direction))

    def test_float32_inside_a_float64_loss(self):
        """Catches: float64's tolerance for a loss that computes in float32 whatever it is given."""
        loss = lambda p, x: F.linear(x.float(), p["w"].float()).double().sin().sum()  # noqa: E731
        assert pegrad.check(loss, cast(PARAMS, torch.float64), BATCH.double()).tolerances == (1e-4,)
        report = pegrad.check(loss, PARAMS, BATCH)
        assert report.tolerances == (1e-4, 1e-4)
        assert any("computes in float32" in note for note in report.notes)

    def test_autocast(self):
        """Catches: float32's tolerance for a loss that runs in bfloat16."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = pegrad.check(lambda p, x: F.linear(x, p["w"]).float().sin().sum(), PARAMS, BATCH)
        assert report.tolerances[1] == 6e-2


@pegrad.operation
def layer(x, w, b):
    return F.linear(x, w, b)


def two_layers(params, x):
    return layer(layer(x, params["u"], params["c"]).tanh(), params["u"], params["b"]).sin().sum()


SQUARE = {"u": torch.randn(4, 4, generator=torch.Generator().manual_seed(2)), "c": torch.zeros(4), "b": torch.zeros(4)}
FREE = Work(0, moved=0)  # costs nothing, so it is chosen


@dataclass(frozen=True, eq=False)
class Wrong(LinearWeight):
    """A weight one of whose kernels is off by a factor."""

    stack: float = 1.0
    norm: float = 1.0
    sum: float = 1.0

    def stacking(self, x, g):
        run = super().stacking(x, g)["product"].run
        return {"product": pegrad.Kernel("product", Work(1e12), lambda x, g: self.stack * run(x, g))}

    def norming(self, x, g):
        run = super().stacking(x, g)["product"].run
        return {"free": pegrad.Kernel("gram", FREE, lambda x, g: self._norms(run(x, g)))}

    def _norms(self, rows):
        squares = rows.flatten(1).square().sum(1)
        return Squares(self.norm * squares, squares, squares, squares.new_ones(len(squares)))

    def summing(self, x, g):
        run = super().summing(x, g).run
        return pegrad.Kernel("native", FREE, lambda x, g: self.sum * run(x, g))


def rule_with(sites):
    """A rule of `layer` that notes the sites `sites(w, b, call)`, `call` counting calls within one run."""

    def rule(trace, x, w, b):
        call = sum(tapped.dtype.is_floating_point for tapped in trace.tapped)

        def run(x, tap):
            return tap(F.linear(x, w.detach(), b.detach()), x, sites(w, b, call))

        return trace.record(run, x)

    return {layer: rule}


def bias(b):
    return Bias(b, "bias", over_leading(1))


class TestPlantedFaults:
    """Catches: a comparison that one kind of answer, one leaf or one use is left out of."""

    def found(self, sites, strategy=pegrad.BookKeeping):
        """Check one layer under a rule with these sites; return what differs, once the message names it."""
        loss = lambda p, x: layer(x, p["u"], p["b"]).sin().sum()  # noqa: E731
        with pytest.raises(pegrad.CheckError) as error:
            pegrad.check(loss, {"u": SQUARE["u"], "b": SQUARE["b"]}, BATCH, strategy=strategy(rules=rule_with(sites)))
        report = error.value.report
        assert str(report) in str(error.value)
        assert all(f"{row.path} ({row.verdict})" in str(error.value) for row in report.differing)
        return {row.path: row.verdict for row in report.differing}

    @pytest.mark.parametrize("strategy", [pegrad.BookKeeping, pegrad.Ghost])
    @pytest.mark.parametrize("factor", [0.5, 0.999, 1.001, 4.0])
    def test_a_wrong_norm(self, factor, strategy):
        found = self.found(lambda w, b, call: [Wrong(w, "wrong", norm=factor), bias(b)], strategy)
        assert found["norms"] == "wrong"
        assert "gradient" not in found.get("params['u']", "")

    @pytest.mark.parametrize("factor", [0.0, 0.999, 1 + 1e-6, -1.0, float("inf"), float("nan")])
    def test_wrong_stacking(self, factor):
        found = self.found(lambda w, b, call: [Wrong(w, "wrong", stack=factor), bias(b)])
        assert found == {"params['u']": "wrong gradient"}

    @pytest.mark.parametrize("strategy", [pegrad.BookKeeping, pegrad.Ghost])
    @pytest.mark.parametrize("factor", [0.0, 0.999, 2.0])
    def test_a_wrong_sum(self, factor, strategy):
        found = self.found(lambda w, b, call: [Wrong(w, "wrong", sum=factor), bias(b)], strategy)
        assert found == {"params['u']": "wrong sum"}

    @pytest.mark.parametrize("strategy", [pegrad.BookKeeping, pegrad.Ghost])
    def test_a_leaf_dropped(self, strategy):
        found = self.found(lambda w, b, call: [LinearWeight(w, "linear")], strategy)
        assert found["params['b']"] == "wrong gradient and sum"

    @pytest.mark.parametrize("dropped", [0, 1])
    def test_a_use_dropped(self, dropped):
        rules = rule_with(lambda w, b, call: [bias(b)] if call == dropped else [LinearWeight(w, "linear"), bias(b)])
        with pytest.raises(pegrad.CheckError) as error:
            pegrad.check(two_layers, SQUARE, BATCH, strategy=pegrad.BookKeeping(rules=rules))
        verdicts = {row.path: row.verdict for row in error.value.report.differing}
        assert verdicts["params['u']"] == "wrong gradient and sum"
        assert "params['b']" not in {path for path, verdict in verdicts.items() if "gradient" in verdict}

    def test_right_rules_pass(self):
        rules = rule_with(lambda w, b, call: [Wrong(w, "right"), bias(b)])
        pegrad.check(two_layers, SQUARE, BATCH, strategy=pegrad.BookKeeping(rules=rules))

    @pytest.mark.parametrize("rows", [1, 4])
    def test_norms_that_are_infinite(self, rows):
        """Catches: a strategy that gives no example any weight, and so agrees on all that it has."""

        class Careful(type(pegrad.STRATEGIES["naive"])):
            def clipped_sum(self, problem, grouping):
                mask = torch.arange(problem.batch_size) >= rows
                sums, squares, values = super().clipped_sum(replace(problem, mask=mask), grouping)
                return sums, squares.masked_fill(~mask[:, None], torch.inf), values

        if rows == 1:
            report = pegrad.check(plain, PARAMS, BATCH, strategy=Careful())
            assert any("no weight" in note for note in report.notes)
            return
        with pytest.raises(pegrad.CheckError, match=r"norms \(wrong\)"):
            pegrad.check(plain, PARAMS, BATCH, strategy=Careful())

    @pytest.mark.parametrize("examples", [2, 3, 4])
    @pytest.mark.parametrize("how", ["none clipped", "all normalised"])
    def test_a_sum_that_clips_none_or_normalises_all(self, how, examples):
        """Catches: a bound that all gradients exceed, or none."""

        class Otherwise(type(pegrad.STRATEGIES["naive"])):
            def clipped_sum(self, problem, grouping):
                (weighting,) = grouping.weightings
                return super().clipped_sum(problem, Grouping(grouping.of, (Weights(weighting.clip_norm),)))

        @dataclass(frozen=True)
        class Weights(Flat):
            bound = math.inf  # or it would be held to it

            def weights(self, squared_norms, mask):
                return (
                    torch.ones_like(squared_norms) if how == "none clipped" else self.clip_norm / squared_norms.sqrt()
                )

        with pytest.raises(pegrad.CheckError, match=r"params\['w'\] \(wrong sum\)"):
            pegrad.check(plain, PARAMS, BATCH, strategy=Otherwise(), examples=examples)

    @pytest.mark.parametrize("what", ["norms", "sum"])
    def test_groups_that_are_not_kept_apart(self, what):
        """Catches: a check that does not ask for what a clipping by groups makes of norms and sum."""

        class Together(type(pegrad.STRATEGIES["naive"])):
            def clipped_sum(self, problem, grouping):
                sums, squares, values = super().clipped_sum(problem, grouping)
                if what == "norms":
                    return sums, squares.flip(1), values
                return super().clipped_sum(problem, Grouping.flat(2, grouping.weightings[0]))[0], squares, values

        match = r"norms \(wrong\)" if what == "norms" else "wrong sum"
        with pytest.raises(pegrad.CheckError, match=match):
            pegrad.check(plain, PARAMS, BATCH, strategy=Together(), clip_norm=PerLeaf(1.0))

    @pytest.mark.parametrize("strategy", ["auto", "ghost", "vmap"])
    @pytest.mark.parametrize(
        "clipping", [1e-3, PerLeaf(1.0), PerLayer(1e3), Automatic(1.0), PerLeaf(0.1, weighting=Normalised)]
    )
    def test_any_clipping_may_be_checked(self, clipping, strategy):
        """Catches: a right strategy called wrong, since the check weighs otherwise than the clipping."""
        assert not pegrad.check(plain, PARAMS, BATCH, strategy=strategy, clip_norm=clipping).differing

    def test_norms_that_cancel_in_float32_alone(self):
        """Catches: a comparison in float64 only."""

        class Naive32(type(pegrad.STRATEGIES["naive"])):
            def reduce(self, problem, reduction):
                answer, values = super().reduce(problem, reduction)
                if isinstance(reduction, SquaredNorms) and problem.params[0].dtype == torch.float32:
                    answer = [squares * 1.01 for squares in answer]
                return answer, values

        with pytest.raises(pegrad.CheckError) as error:
            pegrad.check(plain, PARAMS, BATCH, strategy=Naive32())
        (row,) = error.value.report.differing
        assert row.path == "norms"
        assert row.errors[0] <= 1e-10
        assert 1e-3 < row.errors[1] < 1e-1


class Rows(Stacking):
    """The loop, and then something wrong with its rows."""

    def __init__(self, spoil):
        self.spoil = spoil

    def stacked(self, problem):
        grads, values = pegrad.STRATEGIES["naive"].stacked(problem)
        return [self.spoil(grad) for grad in grads], values


class TestRows:
    @pytest.mark.parametrize("spoil", [lambda g: g.flip(0), lambda g: g + 1e-3 * g.mean(0), lambda g: g - g.mean(0)])
    def test_rows_that_are_swapped_or_leak_are_said_to_be_coupled(self, spoil):
        """Catches: a comparison of what does not depend on order, and a hint that is not given."""
        spoil_several = lambda g: spoil(g) if len(g) > 1 else g  # noqa: E731
        with pytest.raises(pegrad.CheckError, match="Each example by itself agrees"):
            pegrad.check(plain, PARAMS, BATCH, strategy=Rows(spoil_several))

    def test_a_wrong_shape_is_a_difference_and_no_crash(self):
        with pytest.raises(pegrad.CheckError, match=r"params\['w'\] \(wrong gradient"):
            pegrad.check(plain, PARAMS, BATCH, strategy=Rows(lambda g: g.flatten(1)))

    def test_one_small_row_among_large_ones(self):
        """Catches: errors relative to the largest row."""
        batch = BATCH * torch.tensor([1e6, 1e-6, 1e6, 1e6, 1, 1])[:, None]
        spoil = lambda g: torch.cat([g[:1], g[1:2] * 1.01, g[2:]])  # noqa: E731
        with pytest.raises(pegrad.CheckError):
            pegrad.check(lambda p, x: (F.linear(x, p["w"])).sum(), {"w": PARAMS["w"]}, batch, strategy=Rows(spoil))

    @pytest.mark.parametrize("examples", [1, 2, 6, 100])
    def test_as_many_examples_as_asked_for(self, examples):
        report = pegrad.check(plain, PARAMS, BATCH, examples=examples)
        assert report.examples == min(examples, 6)
        assert f"{report.examples} example" in str(report)


def dropping(params, x):
    return F.linear(F.dropout(x, 0.5), params["w"], params["b"]).sin().sum(), {"seen": x.sum()}


class TestRandomLosses:
    @pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
    @pytest.mark.parametrize(
        "loss", [dropping, lambda p, x: F.linear(x + torch.randn_like(x), p["w"], p["b"] * torch.rand(3)).sin().sum()]
    )
    def test_they_are_compared_from_equal_seeds(self, loss, strategy):
        """Catches: different draws taken for a fault; the caller's generator left elsewhere."""
        before = torch.get_rng_state()
        report = pegrad.check(loss, PARAMS, BATCH, strategy=strategy)
        assert torch.equal(torch.get_rng_state(), before)
        assert any("draws random numbers" in note for note in report.notes)
        assert {row.verdict for row in (*report.leaves, *report.values)} == {"same"}

    def test_faults_are_still_seen(self):
        """Catches: a comparison that randomness turns off."""
        for spoil in (lambda g: g * 1.001, lambda g: torch.zeros_like(g)):
            with pytest.raises(pegrad.CheckError, match=r"params\['w'\] \(wrong gradient"):
                pegrad.check(dropping, PARAMS, BATCH, strategy=Rows(spoil))

    def test_a_wrong_norm_of_several_examples_is_seen(self):
        """Catches: random losses compared one example at a time only."""

        class Coupled(Rows):
            def reduce(self, problem, reduction):
                answer, values = super().reduce(problem, reduction)
                if isinstance(reduction, SquaredNorms):
                    answer = [squares.mean(0, keepdim=True).expand_as(squares) for squares in answer]
                return answer, values

        with pytest.raises(pegrad.CheckError, match=r"norms \(wrong\)"):
            pegrad.check(dropping, PARAMS, BATCH, strategy=Coupled(lambda g: g))

    def test_a_strategy_that_draws_otherwise_is_compared_with_itself_and_says_so(self):
        """Catches: a verdict on gradients that could not be compared."""

        class Otherwise(Rows):
            def stacked(self, problem):
                torch.rand(1)
                return super().stacked(problem)

        report = pegrad.check(dropping, PARAMS, BATCH, strategy=Otherwise(lambda g: g))
        assert {row.verdict for row in report.leaves} == {"sum only"}
        assert report.values[0].verdict == "not compared"
        assert any("draws other random numbers" in note for note in report.notes)
        assert "not compared" in str(report)


class TestImpureLosses:
    @pytest.mark.parametrize("source", ["counter", "python"])
    def test_hidden_state(self, source):
        """Catches: a loss that gives something else every time, taken for a fault of the strategy."""
        calls = []

        def loss(params, x):
            calls.append(None)
            factor = len(calls) if source == "counter" else python_random.random()
            return plain(params, x) * factor

        with pytest.raises(pegrad.CheckError, match="not a pure function"):
            pegrad.check(loss, PARAMS, BATCH)

    def test_arguments_changed_in_place_are_named_and_the_callers_are_left_alone(self):
        def writes_example(params, example):
            example["x"].mul_(2)
            return plain(params, example["x"])

        def writes_params(params, example):
            with torch.no_grad():
                params["b"].add_(1)
            return plain(params, example["x"])

        params, batch = cast(PARAMS, torch.float64), {"x": BATCH.double(), "y": torch.arange(6)}
        before = params["b"].clone(), batch["x"].clone()
        with pytest.raises(pegrad.LossError, match=r"changes batch\['x'\] in place"):
            pegrad.check(writes_example, params, batch)
        with pytest.raises(pegrad.LossError, match=r"changes params\['b'\] in place"):
            pegrad.check(writes_params, params, batch)
        assert torch.equal(params["b"], before[0])
        assert torch.equal(batch["x"], before[1])

    @pytest.mark.parametrize("how", ["module called itself", "detached", "no_grad"])
    def test_no_leaf_used(self, how):
        """Catches: training on nothing but noise, as its gradients of zero are the loop's as well."""
        module = nn.Linear(4, 3)

        def loss(params, x):
            if how == "module called itself":
                return module(x).sum()
            if how == "detached":
                return functional_call(module, params, (x,)).sum().detach()
            with torch.no_grad():
                return functional_call(module, params, (x,)).sum()

        with pytest.raises(pegrad.LossError, match="functional_call"):
            pegrad.check(loss, dict(module.named_parameters()), BATCH)

    def test_parameters_that_were_left_out_are_noted(self):
        module = nn.Linear(4, 3)
        report = pegrad.check(lambda p, x: functional_call(module, p, (x,)).sin().sum(), {"weight": PARAMS["w"]}, BATCH)
        assert any("1 tensor(s) that require a gradient" in note for note in report.notes)


class TestWhatCannotBeCompared:
    def test_rows_that_are_not_finite_are_left_out_and_counted(self):
        """Catches: NaN compared with NaN, and a NaN row that hides another row's fault."""
        batch = BATCH.clone()
        batch[1], batch[2, 0] = float("nan"), float("inf")
        report = pegrad.check(plain, PARAMS, batch)
        assert report.left_out == 2
        assert any("2 of 4 examples were left out" in note for note in report.notes)
        spoil = lambda g: torch.cat([g[:3], g[3:] * 1.01])  # noqa: E731
        with pytest.raises(pegrad.CheckError, match="wrong gradient"):
            pegrad.check(plain, PARAMS, batch, strategy=Rows(spoil))

    def test_a_row_that_overflows_in_the_given_dtype_is_compared_in_float64(self):
        factors = torch.tensor([1, 1e25, 1, 1, 1, 1])[:, None]
        report = pegrad.check(lambda p, x: F.linear(x, p["w"]).sum(), {"w": PARAMS["w"]}, BATCH * factors)
        assert report.left_out == 1

    @pytest.mark.parametrize("closes_over", [False, True])
    def test_a_row_that_overflows_in_the_loop_alone(self, closes_over):
        """Catches: a strategy that computes in float32 where the loop overflows, and is taken for wrong."""
        constant = torch.ones(3).half() if closes_over else None

        def loss(params, x):
            y = F.linear(x, params["w"]).sum(0)
            return y.sum() if constant is None else y @ constant

        batch = torch.ones(4, 64, 4).half()
        batch[1] *= 2000  # the gradient of the weight is a sum over 64 positions
        report = pegrad.check(loss, {"w": torch.randn(3, 4).half() / 100}, batch, strategy="book_keeping")
        assert report.left_out == 1
        (leaf,) = report.leaves
        assert leaf.verdict == ("gradient only" if closes_over else "same")
        assert any("sum was not compared" in note for note in report.notes) == closes_over

    @pytest.mark.parametrize("factor", [1e-12, 1e12])
    def test_gradients_that_no_clip_norm_suits(self, factor):
        """Catches: a clip norm that is refused."""
        pegrad.check(lambda p, x: plain(p, x) * factor, PARAMS, BATCH)

    def test_an_infinite_loss_with_a_finite_gradient_is_no_difference(self):
        loss = lambda p, x: F.linear(x, p["w"]).sum() * torch.tensor(60000.0, dtype=x.dtype)  # noqa: E731
        batch = torch.tensor([[1.0, 1, 1, 1], [0.1, 0, 0, 0]])
        assert pegrad.check(loss, {"w": torch.ones(3, 4).half()}, batch.half()).left_out == 0

    def test_nothing_finite(self):
        with pytest.raises(pegrad.CheckError, match="nothing to compare"):
            pegrad.check(lambda p, x: plain(p, x) * float("nan"), PARAMS, BATCH)

    def test_float64_that_cannot_be_run_is_said_and_the_given_dtype_still_compared(self):
        """Catches: a crash, or silence, where the loss closes over float32."""
        constant = torch.randn(4)
        loss = lambda p, x: (p["w"] @ constant).sin().sum() * x.sum() + p["b"].sum()  # noqa: E731
        report = pegrad.check(loss, PARAMS, BATCH)
        assert report.dtypes == ("float32",)
        assert any("float64 could not be run" in note and "dtype" in note for note in report.notes)
        with pytest.raises(pegrad.CheckError, match="wrong gradient"):
            pegrad.check(loss, PARAMS, BATCH, strategy=Rows(lambda g: g * 1.01))

    def test_an_error_of_the_losss_own_is_not_quoted(self):
        """Catches: data in a note."""

        def loss(params, x):
            if x.dtype == torch.float64:
                raise ValueError(f"bad value {x[0]}")
            return plain(params, x)

        (note,) = pegrad.check(loss, PARAMS, BATCH).notes
        assert note.endswith("ValueError")

    @pytest.mark.parametrize("batch", [BATCH[:0], (BATCH[:0], torch.arange(0))])
    def test_an_empty_batch(self, batch):
        with pytest.raises(pegrad.ArgumentError, match="at least one example"):
            pegrad.check(plain, PARAMS, batch)

    def test_arguments(self):
        with pytest.raises(pegrad.ArgumentError, match="examples=0"):
            pegrad.check(plain, PARAMS, BATCH, examples=0)
        with pytest.raises(pegrad.ArgumentError, match="'fast'"):
            pegrad.check(plain, PARAMS, BATCH, strategy="fast")
        with pytest.raises(pegrad.LeafError, match=r"params\['w'\]"):
            pegrad.check(plain, {"w": 1.0}, BATCH)
        with pytest.raises(pegrad.LeafError, match=r"batch\[1\] has 4"):
            pegrad.check(plain, PARAMS, (BATCH, torch.ones(4)))

    @pytest.mark.parametrize("strategy", ["auto", "naive"])
    def test_inference_mode_is_left(self, strategy):
        with torch.inference_mode():
            report = pegrad.check(plain, PARAMS, BATCH * 1, strategy=strategy)
        assert {row.verdict for row in report.leaves} == {"same"}

    @pytest.mark.parametrize("strategy", ["auto", "vmap"])
    def test_compiled_functions_are_compared_with_what_they_were_compiled_from(self, strategy):
        """Catches: a loop that dynamo traces."""
        compiled = torch.compile(lambda x, w: F.linear(x, w).sin().sum(), backend="eager")
        pegrad.check(lambda p, x: compiled(x, p["w"]), {"w": PARAMS["w"]}, BATCH, strategy=strategy)


class TestReport:
    def long(self):
        params = {
            "a_module_with_a_long_name": {"and_a_longer_one_inside": {"weight" + "_" * 50: PARAMS["w"]}},
            "b<i>": PARAMS["b"],
        }

        def loss(params, example):
            (inner,) = params["a_module_with_a_long_name"]["and_a_longer_one_inside"].values()
            return F.linear(example[0], inner, params["b<i>"]).sin().sum()

        return loss, params, (BATCH, torch.arange(6))

    def test_it_prints_within_100_columns_whatever_the_paths(self):
        """Catches: a table too wide, a path cut short."""
        report = pegrad.check(*self.long())
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= 100
        joined = "".join(lines)
        assert all(row.path in joined for row in report.leaves)
        assert lines[0].startswith(
            "auto against the plain loop, 4 examples; tolerance 1e-10 (float64), 1e-04 (float32)"
        )
        assert lines[1].split()[:4] == ["leaf", "shape", "float64", "float32"]

    def test_it_renders_as_html(self):
        html = pegrad.check(*self.long())._repr_html_()
        assert html.count("<tr>") == 1 + 2 + 2
        assert "params[&#x27;b&lt;i&gt;&#x27;]" in html

    def test_unused_leaves_are_shown(self):
        report = pegrad.check(plain, {**PARAMS, "unused": torch.ones(2)}, BATCH)
        assert {leaf.path: leaf.verdict for leaf in report.leaves}["params['unused']"] == "not used"

    def test_values_of_examples_are_in_no_message(self):
        """Catches: private data in an error."""
        batch = torch.full((3, 4), 7.123456)
        with pytest.raises(pegrad.CheckError) as error:
            pegrad.check(plain, PARAMS, batch, strategy=Rows(lambda g: g * 2))
        assert "7.12" not in str(error.value)


def test_it_changes_nothing_of_the_callers():
    """Catches: gradients left on parameters, grad mode or arguments changed."""
    module = nn.Linear(4, 3)
    params = dict(module.named_parameters())
    with torch.no_grad():
        pegrad.check(lambda p, x: functional_call(module, p, (x,)).sin().sum(), params, BATCH)
        assert not torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in params.values())
