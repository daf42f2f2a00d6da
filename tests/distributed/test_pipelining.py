"""Pipelines against the composed loss on one process, on gloo and loopback."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import SIZES, Pool
from torch import Tensor

import oracle
import pegrad
from pegrad.clipping import ByLabel, ByPrefix, PerLayer, PerLeaf
from pegrad.distributed.pipelining import SCHEDULES, Pipelined, compose, pipeline
from pegrad.distributed.pipelining.stage import StageWork
from pegrad.errors import ArgumentError, LeafError, LossError, StrategyError

# A model that is cut into stages


def first(params: Any, image: Tensor) -> Tensor:
    return F.conv2d(image, params["w"], params["b"], padding=1).relu().flatten()[:12]


def middle(params: Any, x: Tensor) -> Tensor:
    return x + F.layer_norm(params["w"] @ x, (12,), params["scale"]).tanh()


def last(params: Any, example: Any) -> Tensor:
    x, label = example
    return F.cross_entropy(params["w"] @ x + params["b"], label)


def stages_of(number: int) -> list[Any]:
    return [first, *[middle] * (number - 2), last]


def params_of(number: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    between = [{"w": normal(12, 12), "scale": normal(12)} for _ in range(number - 2)]
    return [{"w": normal(3, 1, 3, 3), "b": normal(3)}, *between, {"w": normal(5, 12), "b": normal(5)}]


def batch_of(size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images.to(dtype) * torch.linspace(0.1, 2, size, dtype=dtype)[:, None, None, None], torch.arange(size) % 5


MASK = torch.tensor([True, True, False, True, True, False, True, True])


def label(path: str) -> str:
    return "ends" if path.startswith(("[0]", "[3]['w']")) else "rest"


CLIPPINGS: dict[str, Callable[[int], Any]] = {
    "flat": lambda stages: 8.0,
    "each stage": lambda stages: ByPrefix([4.0 + 3.0 * stage for stage in range(stages)]),
    "each leaf": lambda stages: PerLeaf(10.0),
    "some together": lambda stages: ByLabel(label, {"ends": 5.0, "rest": 8.0}),
}


def clipped(
    group: Any, number: int, clipping: str, schedule: str, size: int, batch: Any, mask: Any, dtype: Any = torch.float64
) -> Any:
    """One call: this rank's part, for each of its stages."""
    pipe = pipeline(
        stages_of(number), group, clip_norm=CLIPPINGS[clipping](number), microbatch_size=size, schedule=schedule
    )
    params = params_of(number, dtype)
    out = pipe([params[stage] for stage in pipe.local], batch, mask)
    grads = {stage: numpy(its) for stage, its in zip(pipe.local, out.grads, strict=True)}
    return grads, out.losses.numpy(), out.norms.numpy(), int(out.non_finite)


def numpy(tree: Any) -> Any:
    return {name: leaf.numpy() for name, leaf in tree.items()}


def joined(answers: list[Any]) -> list[Tensor]:
    """The leaves of all stages, in the order of the composed loss's parameters."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    grads = {stage: its for answer in answers for stage, its in answer[0].items()}
    return [torch.from_numpy(grads[stage][name]) for stage in sorted(grads) for name in sorted(grads[stage])]


def reference(number: int, clipping: str, batch: Any, mask: Any, dtype: torch.dtype = torch.float64) -> Any:
    function = pegrad.clipped_grad(compose(stages_of(number)), clip_norm=CLIPPINGS[clipping](number))
    return function(params_of(number, dtype), batch, mask)


STAGES_OF_ONE_PROCESS = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="PyTorch 2.11 sends what one stage gives another of its own process"
)

CASES = [
    ("GPipe", 2, 2),
    ("GPipe", 4, 4),
    ("1F1B", 2, 2),
    ("1F1B", 4, 4),
    ("Interleaved1F1B", 2, 4),
    ("Interleaved1F1B", 4, 4),
    ("InterleavedZeroBubble", 2, 4),
    ("InterleavedZeroBubble", 4, 4),
]


@pytest.mark.parametrize(
    ("schedule", "ranks", "number"), [*CASES, pytest.param("Interleaved1F1B", 1, 2, marks=STAGES_OF_ONE_PROCESS)]
)
def test_every_schedule_gives_the_clipped_sum_of_the_composed_loss(
    pool: Pool, schedule: str, ranks: int, number: int
) -> None:
    batch = batch_of(8)
    for clipping in CLIPPINGS:
        of = [size for size in (1, 2, 8) if schedule != "1F1B" or 8 // size >= number]
        if clipping == "some together" and number < 4:
            continue
        expected = reference(number, clipping, batch, MASK)
        answers = pool.run(sizes_job, ranks, number, clipping, schedule, batch, MASK, of)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        for column in zip(*answers, strict=True):
            oracle.assert_close(expected.grads, joined(list(column)))
            for _, losses, norms, non_finite in column:
                torch.testing.assert_close(torch.from_numpy(losses), expected.losses, atol=1e-12, rtol=1e-10)
                assert non_finite == 0
                if clipping == "flat":
                    torch.testing.assert_close(torch.from_numpy(norms), expected.norms, atol=1e-12, rtol=1e-10)


def sizes_job(group: Any, number: int, clipping: str, schedule: str, batch: Any, mask: Any, of: list[int]) -> Any:
    return [clipped(group, number, clipping, schedule, size, batch, mask) for size in of]


def test_a_pipeline_agrees_with_the_loop(pool: Pool) -> None:
    batch = batch_of(6)
    grads = oracle.per_example_grads(compose(stages_of(2)), params_of(2), batch)
    assert 0 < int((oracle.norms(grads) > 8).sum()) < 6, "some are clipped, and some are not"
    answers = pool.run(clipped, 2, 2, "flat", "1F1B", 2, batch, None)
    oracle.assert_close(joined(answers), oracle.clipped_sum(grads, 8.0))


@pytest.mark.parametrize("clipping", ["flat", "each stage"])
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_a_hostile_row_moves_the_sum_by_at_most_the_sensitivity(pool: Pool, clipping: str, schedule: str) -> None:
    sensitivity = pegrad.clipping.as_clipping(CLIPPINGS[clipping](2)).sensitivity
    without = torch.ones(4, dtype=torch.bool)
    without[1] = False
    for value in (float("nan"), float("inf"), 1e30, 1e15, -1e-30):
        images, labels = batch_of(4, torch.float32)
        images[1] = value
        args = (2, clipping, schedule, 2, (images, labels))
        with_it = joined(pool.run(clipped, 2, *args, None, torch.float32))
        answers = pool.run(clipped, 2, *args, without, torch.float32)
        apart = [a.double() - b.double() for a, b in zip(with_it, joined(answers), strict=True)]
        moved = float(torch.stack([leaf.square().sum() for leaf in apart]).sum().sqrt())
        assert moved <= sensitivity * (1 + 1e-4), f"{value}: {moved}"
        expected = reference(2, clipping, (images, labels), None, torch.float32)
        oracle.assert_close(expected.grads, with_it, 1e-4)


def test_padding_contributes_nothing_whatever_it_holds(pool: Pool) -> None:
    images, labels = batch_of(8)
    clean = joined(pool.run(clipped, 2, 2, "flat", "1F1B", 2, (images, labels), MASK))
    images[~MASK] = float("nan")
    answers = pool.run(clipped, 2, 2, "flat", "1F1B", 2, (images, labels), MASK)
    assert all(map(torch.equal, clean, joined(answers)))
    assert all(answer[3] == 0 and not answer[1][~MASK.numpy()].any() for answer in answers)


@STAGES_OF_ONE_PROCESS
def test_the_number_of_ranks_changes_no_bit(pool: Pool) -> None:
    batch = batch_of(8, torch.float32)
    args = (4, "flat", "Interleaved1F1B", 2, batch, MASK, torch.float32)
    one, two, four = (joined(pool.run(clipped, ranks, *args)) for ranks in SIZES)
    assert all(map(torch.equal, one, two))
    assert all(map(torch.equal, one, four))


@pytest.mark.parametrize(
    ("schedule", "ranks", "most"), [("GPipe", 4, 4), ("1F1B", 4, 4), ("InterleavedZeroBubble", 2, 5)]
)
def test_books_are_kept_for_a_few_micro_batches(pool: Pool, schedule: str, ranks: int, most: int) -> None:
    assert pool.run(most_kept, ranks, schedule, "flat") == [most] * ranks
    assert pool.run(most_kept, ranks, schedule, "each stage") == [1] * ranks


def most_kept(group: Any, schedule: str, clipping: str) -> int:
    """Of how many micro-batches, at most, a stage of this rank kept the books at once."""
    backward, settle = StageWork.backward, StageWork.settle
    now, most = set(), [0]

    def noted(self: StageWork, number: int, at: Tensor) -> Any:
        now.add((self.index, number))
        most[0] = max(most[0], len({number for _, number in now}))
        return backward(self, number, at)

    def dropped(self: StageWork, number: int, squares: Tensor) -> None:
        now.discard((self.index, number))
        settle(self, number, squares)

    StageWork.backward, StageWork.settle = noted, dropped  # type: ignore[method-assign]
    try:
        clipped(group, 4, clipping, schedule, 1, batch_of(12), None)
    finally:
        StageWork.backward, StageWork.settle = backward, settle  # type: ignore[method-assign]
    return most[0]


def test_an_empty_batch_gives_zeros(pool: Pool) -> None:
    for clipping in ("flat", "each stage"):
        answers = pool.run(clipped, 2, 2, clipping, "1F1B", 2, batch_of(0), None)
        assert all(not leaf.any() for leaf in joined(answers))
        assert all(answer[1].shape == (0,) and answer[2].shape[-1] == 0 for answer in answers)


def test_a_sum_over_parts_is_that_over_all(pool: Pool) -> None:
    whole = joined(pool.run(clipped, 2, 2, "flat", "1F1B", 2, batch_of(8), MASK))
    halves = [leaf / 2 for leaf in whole]
    oracle.assert_close(joined(pool.run(in_parts, 2, batch_of(8), MASK)), halves)


def in_parts(group: Any, batch: Any, mask: Tensor) -> Any:
    pipe = pipeline(stages_of(2), group, clip_norm=8.0, microbatch_size=2, normalize_by=2.0)
    params = [params_of(2)[stage] for stage in pipe.local]
    sums = pipe.init(params)
    for part in (slice(0, 4), slice(4, 8)):
        sums, *_ = pipe.add(sums, params, (batch[0][part], batch[1][part]), mask[part])
    return {pipe.local[0]: numpy(pipe.finish(sums)[0])}, None


def test_a_sum_over_many_rows_is_a_float64(pool: Pool) -> None:
    batch = batch_of(300, torch.float32)
    grads = joined(pool.run(clipped, 2, 2, "each stage", "GPipe", 100, batch, None, torch.float32))
    assert {leaf.dtype for leaf in grads} == {torch.float64}
    oracle.assert_close(reference(2, "each stage", batch, None, torch.float32).grads, grads, 1e-5)


def test_a_pipeline_is_called_under_autocast_and_without(pool: Pool) -> None:
    batch, params = batch_of(8, torch.float32), params_of(2, torch.float32)
    function = pegrad.clipped_grad(compose(stages_of(2)), clip_norm=8.0)
    answers = pool.run(cast_and_not, 2, params, batch)
    for call, enabled in enumerate((False, True, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            expected = function(params, batch)
        oracle.assert_close(expected.grads, joined([answer[call] for answer in answers]), 1e-5)


def cast_and_not(group: Any, params: Any, batch: Any) -> Any:
    pipe = pipeline(stages_of(2), group, clip_norm=8.0, microbatch_size=2)
    answers = []
    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = pipe([params[stage] for stage in pipe.local], batch)
        answers.append(({pipe.local[0]: numpy(out.grads[0])},))
    return answers


# Stages that the trace must step aside for


class Doubled(torch.autograd.Function):
    """Between a parameter and its use: the trace cannot know that it is linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def opaque(params: Any, x: Tensor) -> Tensor:
    return Doubled.apply(params["w"]) * x.tanh()


def leaking(params: Any, x: Tensor) -> Tensor:
    """`2 w x`, in a way that the trace sees only when it is run backward."""
    return torch.func.grad(lambda w: (w * w + x).sum())(params["w"]) * x


def dropping(params: Any, x: Tensor) -> Tensor:
    return leaking(params, F.dropout(x, 0.5))


def linear(params: Any, example: Any) -> Tensor:
    x, target = example
    return (params["w"] * x).sum() + target


ODD = {"opaque": [opaque, linear], "leaking": [leaking, linear], "dropping": [dropping, linear]}


def odd(group: Any, which: str, params: Any, batch: Any, clip_norm: float) -> Any:
    torch.manual_seed(3)
    pipe = pipeline(ODD[which], group, clip_norm=clip_norm, microbatch_size=2, schedule="GPipe")
    out = pipe([params[stage] for stage in pipe.local], batch)
    return {pipe.local[0]: numpy(out.grads[0])}, out.norms.numpy()


@pytest.mark.parametrize("which", ["opaque", "leaking"])
def test_a_stage_that_hides_uses_of_its_parameters_is_exact(pool: Pool, which: str) -> None:
    params = [{"w": torch.arange(1.0, 6.0).double()}, {"w": torch.arange(5.0, 0.0, -1.0).double()}]
    batch = torch.linspace(-1, 1, 20).double().reshape(4, 5), torch.zeros(4).double()
    grads = oracle.per_example_grads(compose(ODD[which]), params, batch)
    oracle.assert_close(joined(pool.run(odd, 2, which, params, batch, 5.0)), oracle.clipped_sum(grads, 5.0))


def test_a_stage_that_runs_again_draws_the_same_random_numbers(pool: Pool) -> None:
    params = [{"w": torch.arange(1.0, 6.0).double()}, {"w": torch.arange(5.0, 0.0, -1.0).double()}]
    batch = torch.ones(4, 5).double(), torch.zeros(4).double()
    first, second = joined(pool.run(odd, 2, "dropping", params, batch, 1e6))
    kept = first / (2 * params[1]["w"])  # how often each number was kept, in the run that found the gradient
    assert 0 < float(kept.sum()) < 40
    oracle.assert_close([second], [2 * params[0]["w"] * kept])  # and in the one whose output was passed on


# What is refused


CAPTURED = torch.ones(12, dtype=torch.float64, requires_grad=True)


def capturing(params: Any, image: Tensor) -> Tensor:
    return first(params, image) * CAPTURED


def pair(params: Any, image: Tensor) -> Any:
    return first(params, image), image


def idle(params: Any, image: Tensor) -> Tensor:
    return image.flatten()[:12]


def coupled(params: Any, image: Tensor) -> Tensor:
    return F.batch_norm(first(params, image)[None, :, None], None, None, training=True)[0, :, 0]


def filled(params: Any, image: Tensor) -> Tensor:
    image[0] = 0
    return first(params, image)


def vector(params: Any, example: Any) -> Tensor:
    return params["w"] @ example[0] + params["b"]


def refused(group: Any, change: dict[str, Any], call: dict[str, Any]) -> None:
    """A call that is right but for some changes; `only` names the rank on which they are made."""
    only = call.get("only")
    made = change if only is None or only == dist.get_rank(group) else {}
    here = call if only is None or only == dist.get_rank(group) else {}
    settings = {"clip_norm": 1.0, "microbatch_size": 2, "schedule": "1F1B", "stages": stages_of(2), **made}
    pipe = pipeline(settings.pop("stages"), group, **settings)
    params = [params_of(2)[stage] for stage in pipe.local]
    pipe(here.get("params", params), here.get("batch", batch_of(8)), here.get("mask"))


def unbatchable(params: Any, image: Tensor) -> Tensor:
    return Unbatchable.apply(first(params, image))


class Unbatchable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "an unknown schedule": ({"schedule": "ZBV"}, {}, ArgumentError, "schedule to be one of GPipe, 1F1B"),
    "no stage": ({"stages": []}, {}, ArgumentError, "at least one function"),
    "three stages on two ranks": ({"stages": stages_of(3)}, {}, ArgumentError, "as many stages as ranks"),
    "three stages, interleaved": (
        {"stages": stages_of(3), "schedule": "Interleaved1F1B"},
        {},
        ArgumentError,
        "a multiple of the number of ranks",
    ),
    "no micro-batch size": ({"microbatch_size": 0}, {}, ArgumentError, "microbatch_size"),
    "a negative clip norm": ({"clip_norm": -1.0}, {}, ArgumentError, "clip_norm"),
    "a batch that is no multiple": ({"microbatch_size": 3}, {}, ArgumentError, "Pad the batch, and mask the padding"),
    "too few micro-batches": ({"microbatch_size": 8}, {}, ArgumentError, "at least 2 micro-batches"),
    "uneven rounds": (
        {"microbatch_size": 2, "schedule": "Interleaved1F1B"},
        {"batch": batch_of(10)},
        ArgumentError,
        "equal rounds",
    ),
    "a batch that is no pair": ({}, {"batch": batch_of(8)[0]}, LeafError, "expected a pair"),
    "a mask of numbers": ({}, {"mask": torch.ones(8)}, LeafError, "mask is no boolean tensor"),
    "parameters of another number of stages": ({}, {"params": params_of(2)}, LeafError, "list of 1"),
    "a captured parameter": ({"stages": [capturing, last]}, {}, LossError, "is no parameter"),
    "a stage that returns a pair": ({"stages": [pair, last]}, {}, LossError, "no aux"),
    "a stage without its parameters": ({"stages": [idle, last]}, {}, LossError, "depend on any leaf of params"),
    "a stage for one example only": ({"stages": [unbatchable, last]}, {}, StrategyError, "Stage 0 cannot run on all"),
    "a stage that changes its input": ({"stages": [filled, last]}, {}, LossError, "in place"),
    "batch normalisation": ({"stages": [coupled, last]}, {}, LossError, "batch normalisation"),
    "a last stage that returns a vector": ({"stages": [first, vector]}, {}, LossError, "scalar loss"),
    "a clipping that does not fit": ({"clip_norm": ByPrefix([1.0] * 3)}, {}, LeafError, "prefix"),
    "other masks": ({}, {"mask": MASK, "only": 1}, ArgumentError, "They differ"),
    "other batches": ({}, {"batch": batch_of(6), "only": 0}, ArgumentError, "They differ"),
    "other micro-batches": ({"microbatch_size": 4}, {"only": 1}, ArgumentError, "They differ"),
    "other bounds": ({"clip_norm": 2.0}, {"only": 1}, ArgumentError, "They differ"),
    "other groups": (
        {"clip_norm": PerLayer(1.0, depth=1)},
        {"only": 1},
        ArgumentError,
        "differ",
    ),
}
ALONE: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "a wrong mask on one rank": ({}, {"mask": torch.ones(8), "only": 1}, LeafError, "mask"),
    "a captured parameter on one rank": ({"stages": [capturing, last]}, {"only": 0}, LossError, "is no parameter"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_every_rank_refuses(pool: Pool, what: str) -> None:
    change, call, kind, message = REFUSED[what]
    for answer in pool.run(refused, 2, change, call):
        assert isinstance(answer, kind | LossError), repr(answer)
        assert message in str(answer) or "says why" in str(answer), str(answer)


def changing(params: Any, image: Tensor) -> Tensor:
    CALLS.append(None)
    return first(params, image)[: -1 if len(CALLS) > 3 else None]


CALLS: list[None] = []


@STAGES_OF_ONE_PROCESS
def test_an_output_of_another_shape_than_was_agreed_is_refused(pool: Pool) -> None:
    change = {"stages": [changing, last], "schedule": "Interleaved1F1B"}
    (answer,) = pool.run(refused, 1, change, {"params": params_of(2)})
    assert isinstance(answer, LossError), repr(answer)
    assert "expected the same for every micro-batch" in str(answer)


@pytest.mark.parametrize("what", ALONE)
def test_what_one_rank_refuses_ends_the_call_on_all(pool: Pool, what: str) -> None:
    change, call, kind, message = ALONE[what]
    answers = pool.run(refused, 2, change, call)
    alone = answers.pop(call["only"])
    assert type(alone) is kind
    assert message in str(alone)
    assert all(isinstance(answer, pegrad.errors.PegradError) and "says" in str(answer) for answer in answers)


def test_a_pipeline_needs_a_process_group() -> None:
    with pytest.raises(ArgumentError, match="init_process_group"):
        pipeline(stages_of(2), clip_norm=1.0, microbatch_size=1)


def test_the_sensitivity_is_that_of_all_stages(pool: Pool) -> None:
    assert pool.run(sensitivity, 2, [3.0, 4.0]) == [2.5, 2.5]


def sensitivity(group: Any, bounds: list[float]) -> float:
    pipe: Pipelined = pipeline(stages_of(2), group, clip_norm=ByPrefix(bounds), microbatch_size=1, normalize_by=2.0)
    return pipe.sensitivity


@pytest.mark.slow
def test_the_example_trains() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = Path(__file__).parents[2] / "examples" / "pipeline_mnist.py"
    options = ["--steps", "2", "--noise-multiplier", "20"]
    done = subprocess.run([*command, str(example), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 1: loss 2." in done.stdout
    assert "ε = " in done.stdout


def test_all_schedules_are_tested() -> None:
    assert {schedule for schedule, _, _ in CASES} == set(SCHEDULES)
