"""Clipped gradients of a model that is cut into stages, one or several to a process: pipelining with privacy.

A stage is a pure function of its own parameters and one example. `compose` puts the stages together to an ordinary
loss, whose `clipped_grad` says what every schedule must come to. `pipeline` runs them where they live, driven by the
schedules of `torch.distributed.pipelining`. What goes from stage to stage is each example's activation and the gradient
there; norms go only where leaves of several stages are clipped together.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_scale, check_size
from pegrad.accumulation import Added, Sums, extended, nothing, total
from pegrad.clipping import Clipping, Grouping, as_clipping, grouping_of
from pegrad.distributed.pipeline_stage import StageModule, StageWork, restricted
from pegrad.errors import ArgumentError, LeafError, LossError, PegradError
from pegrad.numerics import accumulator
from pegrad.per_example import Clipped, Loss
from pegrad.problem import Leaves
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.tracing.batched import transformed
from pegrad.tracing.eager import outermost
from pegrad.tracing.generators import Generators
from pegrad.trees import PyTree

Stage = Callable[[Any, Any], Tensor]
"""`stage(params, x) -> x` of one example; the last one `stage(params, (x, target)) -> scalar loss`."""

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble")
_ONE_STAGE_A_RANK = ("GPipe", "1F1B")


def compose(stages: Sequence[Stage]) -> Loss:
    """Put stages together to the loss of one example: what a pipeline of them computes.

    Args:
        stages: `stage(params, x) -> x` for one example, without a batch axis, and last
            `stage(params, (x, target)) -> scalar`. A stage alone is a loss as it is.

    Returns:
        `loss(params, example)`, where `params` is a list with a pytree for each stage and `example` a pair
        `(input, target)`: the first stage takes the input and the last one the target.

    Raises:
        ArgumentError: there is no stage, or one is not callable.

    >>> import torch
    >>> loss = compose([lambda p, x: (p["w"] @ x).tanh(), lambda p, xy: (p["w"] @ xy[0] - xy[1]) ** 2])
    >>> loss([{"w": torch.eye(2)}, {"w": torch.ones(2)}], (torch.zeros(2), torch.tensor(3.0)))
    tensor(9.)
    """
    stages = _checked(stages)

    def loss(params: Any, example: Any) -> Tensor:
        if len(stages) == 1:
            return stages[0](params[0], example)
        x, target = example
        for stage, its_params in zip(stages[:-1], params[:-1], strict=True):
            x = stage(its_params, x)
        return stages[-1](params[-1], (x, target))

    return loss


def pipeline(
    stages: Sequence[Stage],
    mesh: Any = None,
    *,
    clip_norm: float | Clipping,
    microbatch_size: int,
    schedule: str = "1F1B",
    normalize_by: float = 1.0,
) -> Pipelined:
    """Make the function whose value is a batch's sum of clipped gradients, each stage's where the stage lives.

    Args:
        stages: as for `compose`; the same on every rank. Stage k lives on rank k modulo the number of ranks.
        mesh: the ranks: a `DeviceMesh` of one dimension, a process group, or None for all.
        clip_norm: as for `pegrad.clipped_grad` of `compose(stages)`, whose parameters are a list with a pytree for
            each stage. A number is one bound for the leaves of all stages together, whose squared norms are then
            exchanged. `PerLayer(C, depth=1)` clips each stage to C/√K, `ByPrefix([C_1, ..., C_K])` to bounds of its
            own: no norm is exchanged, and sums are found inside the backward pass.
        microbatch_size: examples that go through a stage at a time, m >= 1; the batch must be a multiple.
        schedule: `GPipe` or `1F1B`, of one stage a rank; `Interleaved1F1B` or `InterleavedZeroBubble`.
        normalize_by: as for `pegrad.clipped_grad`.

    Returns:
        A `Pipelined`, in whose place on one process `clipped_grad(compose(stages), ...)` would be.

    Raises:
        ArgumentError: a number out of its bounds, an unknown schedule, stages that do not fit the ranks, or no process
            group.

    Guarantee: see `Pipelined`.

    Source: He et al. 2022, "Exploring the limits of differentially private deep learning with group-wise clipping"
    (per-device clipping); Lee et al. 2021, NanoBatch (micro-batches); Huang et al. 2019 (GPipe), Narayanan et al. 2021
    (1F1B, interleaved), Qi et al. 2023 (zero bubble) for the schedules, which are PyTorch's.
    """
    stages = _checked(stages)
    clipping = as_clipping(clip_norm)
    check_scale("normalize_by", normalize_by)
    check_size("microbatch_size", microbatch_size)
    if microbatch_size is None:
        raise ArgumentError("Expected microbatch_size to be a whole number >= 1, got None")
    if schedule not in SCHEDULES:
        raise ArgumentError(f"Expected schedule to be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    group = _group(mesh)
    ranks = dist.get_world_size(group)
    if len(stages) % ranks or (schedule in _ONE_STAGE_A_RANK and len(stages) != ranks):
        number = f"{ranks}" if schedule in _ONE_STAGE_A_RANK else f"a multiple of {ranks}"
        raise ArgumentError(
            f"Expected the number of stages to be {number}, the number of ranks, with schedule {schedule!r}, got "
            f"{len(stages)} stages. Several stages a rank need Interleaved1F1B or InterleavedZeroBubble"
        )
    return Pipelined(stages, group, clipping, microbatch_size, schedule, normalize_by)


@dataclass(frozen=True, eq=False)
class Pipelined:
    """The sum of a batch's clipped gradients, over a public constant, stage by stage. Made by `pipeline`.

    Every rank calls it at once, with the parameters of its own stages. Each gets their part of the sum; the parts
    together are `clipped_grad(compose(stages), clip_norm=...)`, up to rounding. It fits where a `ClippedGrad` does.

    Of the batch, the first stage reads the input and the last one the target. Where leaves of several stages are
    clipped together, the squared norms of a micro-batch are exchanged while later ones are computed, and what its sum
    needs is kept until they are known: for at most as many micro-batches as there are stages. (To wait any sooner for
    the other stages would be to wait forever.)

    Guarantee: for batches that differ by one example, added or removed, the Euclidean distance of the two sums, over
    the leaves of all stages, is at most `sensitivity`, up to rounding, whatever the example is. An example that is not
    finite in a clipping group contributes zero there, on every rank. Bound to
    `test_every_schedule_gives_the_clipped_sum_of_the_composed_loss` and
    `test_a_hostile_row_moves_the_sum_by_at_most_the_sensitivity`.
    """

    stages: tuple[Stage, ...]
    group: Any
    clipping: Clipping
    microbatch_size: int
    schedule: str = "1F1B"
    normalize_by: float = 1.0
    _layouts: dict[Any, _Layout] = field(default_factory=dict, repr=False)
    _book_keeping: BookKeeping = field(default_factory=BookKeeping, repr=False)

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the sums of all stages: the clipping's own over
        `normalize_by`."""
        return self.clipping.sensitivity / self.normalize_by

    @property
    def local(self) -> tuple[int, ...]:
        """The stages of this rank: `params` is a list with a pytree for each."""
        return tuple(range(dist.get_rank(self.group), len(self.stages), self.ranks))

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group)

    def __call__(self, params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Clipped:
        """Evaluate the sum, on every rank at once.

        Args:
            params: a list with the pytree of each of this rank's stages.
            batch: a pair `(input, target)` of pytrees of tensors with one leading axis B, a multiple of the micro-batch
                size.
            mask: `(B,)`, boolean; False marks padding, which contributes exactly zero. The same on every rank.

        Returns:
            A `Clipped`: `grads` of this rank's stages; `losses` on every rank; `norms` and `non_finite` of the clipping
            groups that this rank's leaves are in: `(B,)` where all leaves are clipped together, else `(G, B)`.

        Raises:
            ArgumentError: the batch is no multiple of the micro-batch size, the schedule does not take so many
                micro-batches, or the ranks were not given the same.
            LeafError, LossError: as `pegrad.clipped_grad`; a stage returns anything but one tensor, or uses one that
                requires a gradient and is no leaf of its parameters.
            StrategyError: examples take different paths through a stage.
        """
        sums, *values = self.add(self.init(params), params, batch, mask)
        return Clipped(self.finish(sums), *values)

    def init(self, params: PyTree) -> Sums:
        """Begin a sum: see `ClippedGrad.init`."""
        return nothing(params)

    def finish(self, sums: Sums) -> PyTree:
        """Return the sum of all that was added, for this rank's stages: see `ClippedGrad.finish`."""
        return total(sums)

    @outermost
    def add(self, sums: Sums, params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Added:
        """Add one batch's clipped gradients, on every rank at once, and return new sums.

        Args:
            sums: what `init` or the `add` before returned.
            params: as for a call.
            batch: as for a call.
            mask: as for a call.

        Returns:
            An `Added`, with the fields of a call's `Clipped`.

        Raises:
            ArgumentError, LeafError, LossError, StrategyError: as a call.
        """
        call = self._agreed(params, batch, mask)
        layout = self._layouts.get(call.key) or self._arranged(call)
        with torch.enable_grad():
            run = _Run(self, layout, call)
            if call.size:
                run.run()
        leaves = [leaf for work in run.works for leaf in work.total]
        flat = trees.leaves(params)
        return Added(extended(sums, flat, leaves, call.size), *run.values())

    def _agreed(self, params: PyTree, batch: PyTree, mask: Tensor | None) -> _Call:
        """Check the arguments, and that every rank was given the same: all raise, or none does."""
        failure: PegradError | None = None
        call: _Call | None = None
        try:
            call = self._checked(params, batch, mask)
        except PegradError as error:
            failure = error
        given = None if call is None else (call.size, None if call.mask is None else call.mask.tolist())
        static = (len(self.stages), self.schedule, self.microbatch_size, self.normalize_by, self.clipping.sensitivity)
        device = call.device if call is not None else torch.device("cpu")
        verdicts = _exchange((static, given), call is not None, self.group, device)
        if failure is not None:
            raise failure
        assert call is not None
        refused = [rank for rank, (fine, _) in enumerate(verdicts) if not fine]
        if refused:
            raise ArgumentError(f"Rank {refused[0]} refused its arguments, and says there why")
        if len({digest for _, digest in verdicts}) > 1:
            raise ArgumentError(
                "Expected every rank to be given the same: batches of one size with one mask, and pipelines of the "
                "same stages, schedule, micro-batch size and clipping. They differ"
            )
        known = _exchange(True, call.key in self._layouts, self.group, device)
        if not all(fine for fine, _ in known):
            self._layouts.pop(call.key, None)  # one that another rank must set up is set up by all
        return call

    def _checked(self, params: PyTree, batch: PyTree, mask: Tensor | None) -> _Call:
        if transformed():
            raise ArgumentError("A pipeline cannot run under a transform of torch.func (grad, vmap, jvp, ...)")
        stages = len(self.local)
        if not isinstance(params, list | tuple) or len(params) != stages:
            raise LeafError(
                f"params is no list of {stages}: expected one with a pytree of parameters for each stage of this rank, "
                f"{', '.join(map(str, self.local))}"
            )
        shapes: list[Any] = []
        for its_params in params:
            leaves, spec = trees.flatten_params(its_params)
            shapes.append((spec, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))
        rows, spec, size = trees.flatten_batch(batch)
        if len(self.stages) > 1 and not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise LeafError(f"batch is of type {type(batch).__name__}: expected a pair (input, target)")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (size,)):
            raise LeafError(f"mask is no boolean tensor ({size},): True for examples and False for padding")
        if size % self.microbatch_size:
            raise ArgumentError(
                f"Expected a batch of a multiple of microbatch_size={self.microbatch_size} rows, got {size}: every "
                "micro-batch has one shape. Pad the batch, and mask the padding"
            )
        count = size // self.microbatch_size
        self._check_count(count)
        shapes.append((spec, tuple((row.shape[1:], row.dtype) for row in rows)))
        return _Call(params, batch, mask, size, count, trees.leaves(params)[0].device, (count, *shapes))

    def _check_count(self, count: int) -> None:
        ranks = self.ranks
        rounds = max(1, count // ranks)
        if self.schedule == "1F1B" and 0 < count < len(self.stages):
            raise ArgumentError(
                f"Expected at least as many micro-batches as there are stages, {len(self.stages)}, with schedule "
                f"'1F1B', got {count}: use a smaller microbatch_size, or 'GPipe'"
            )
        if self.schedule not in _ONE_STAGE_A_RANK and count % rounds:
            raise ArgumentError(
                f"Expected a number of micro-batches that falls into {rounds} equal rounds for {ranks} ranks with "
                f"schedule {self.schedule!r}, got {count}: a multiple of the number of ranks always does"
            )

    def _arranged(self, call: _Call) -> _Layout:
        """Find out what goes from stage to stage, and set the schedule up for it."""
        layout = _arrange(self, call)
        self._layouts.clear()  # the buffers of one layout at a time
        self._layouts[call.key] = layout
        return layout


class _Call(NamedTuple):
    """The arguments of a call, checked."""

    params: Any
    batch: Any
    mask: Tensor | None
    size: int
    count: int  # of micro-batches
    device: torch.device
    key: Any  # what a layout depends on


class _Meta(NamedTuple):
    """What all ranks know of a stage."""

    params: Any  # a pytree of tensors without numbers
    shape: tuple[int, ...]  # of one example's output
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Layout:
    """What stays the same from call to call."""

    step: Any  # the schedule's, None for no micro-batch
    modules: list[StageModule]  # of the local stages
    groupings: list[tuple[Grouping, list[int]]]  # of the local stages: see `restricted`
    shared: list[int]  # groups that leaves of several stages are in
    groups: list[int]  # groups that local leaves are in
    together: bool  # whether all leaves are clipped together
    dtype: torch.dtype  # of the losses


def _arrange(pipe: Pipelined, call: _Call) -> _Layout:
    metas = _metas(pipe, call)
    grouping = grouping_of(pipe.clipping, [meta.params for meta in metas])
    described = (grouping.of, [(w.bound, w.floor, type(w).__name__) for w in grouping.weightings])
    if len({digest for _, digest in _exchange(described, True, pipe.group, call.device)}) > 1:
        raise ArgumentError("Expected clip_norm to be the same on every rank, got clippings of different groups")
    counts = [len(trees.leaves(meta.params)) for meta in metas]
    owners = [stage for stage, count in enumerate(counts) for _ in range(count)]
    shared = [g for g in range(len(grouping.weightings)) if len({*_owners(grouping, owners, g)}) > 1]
    grouping = grouping.over(pipe.normalize_by)
    groupings = [
        restricted(grouping, [leaf for leaf, owner in enumerate(owners) if owner == stage]) for stage in pipe.local
    ]
    modules = [StageModule() for _ in pipe.local]
    groups = sorted({group for _, kept in groupings for group in kept})
    step = _schedule(pipe, call, metas, modules) if call.count else None
    return _Layout(step, modules, groupings, shared, groups, grouping.names is None, metas[-1].dtype)


def _owners(grouping: Grouping, owners: list[int], group: int) -> list[int]:
    return [owner for owner, of in zip(owners, grouping.of, strict=True) if of == group]


def _metas(pipe: Pipelined, call: _Call) -> list[_Meta]:
    """Run every stage on one example of zeros, in order, and tell all ranks what came out."""
    zeros = trees.map(lambda rows: rows.new_zeros(rows.shape[1:]), call.batch)
    metas: list[_Meta] = []
    local = iter(call.params)
    for stage in range(len(pipe.stages)):
        found: list[Any] = [None]
        failure: Exception | None = None
        if stage in pipe.local:
            before = Generators.now()
            try:
                found = [_meta(pipe, stage, next(local), zeros, metas, call.device)]
            except Exception as error:
                failure = error
            before.restore()
        source = dist.get_global_rank(pipe.group, stage % pipe.ranks)
        dist.broadcast_object_list(found, src=source, group=pipe.group, device=call.device)
        if failure is not None:
            raise failure
        if found[0] is None:
            raise LossError(f"Stage {stage} cannot run; rank {stage % pipe.ranks} says why")
        metas.append(found[0])
    return metas


def _meta(pipe: Pipelined, stage: int, params: PyTree, zeros: Any, metas: list[_Meta], device: torch.device) -> _Meta:
    last = stage == len(pipe.stages) - 1
    x = torch.zeros(metas[-1].shape, dtype=metas[-1].dtype, device=device) if metas else None
    example = zeros if len(pipe.stages) == 1 else zeros[0] if not metas else (x, zeros[1]) if last else x
    with torch.no_grad():
        value = pipe.stages[stage](params, example)
    if not isinstance(value, Tensor) or not value.is_floating_point() or (last and value.dim()):
        kind = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else ""
        raise LossError(
            f"Stage {stage} returned {kind or type(value).__name__}: expected one floating-point tensor for the next "
            "stage, or, from the last stage, the scalar loss"
        )
    shapes = trees.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), params)
    return _Meta(shapes, tuple(value.shape), value.dtype)


def _schedule(pipe: Pipelined, call: _Call, metas: list[_Meta], modules: list[StageModule]) -> Any:
    """Make PyTorch's stages and schedule, with the shapes that go between them."""
    from torch.distributed.pipelining import PipelineStage  # here, for it brings the compiler along
    from torch.distributed.pipelining.schedules import get_schedule_class

    def example(stage: int) -> Tensor:
        meta = metas[stage]
        shape = (pipe.microbatch_size, *meta.shape)
        return torch.empty(shape, dtype=meta.dtype, device=call.device, requires_grad=True)

    first = torch.zeros(1, dtype=torch.int64)
    stages = [
        PipelineStage(
            module,
            stage,
            len(pipe.stages),
            call.device,
            input_args=example(stage - 1) if stage else first,
            output_args=example(stage),
            group=pipe.group,
        )
        for stage, module in zip(pipe.local, modules, strict=True)
    ]
    given = stages[0] if pipe.schedule in _ONE_STAGE_A_RANK else stages
    made = get_schedule_class(pipe.schedule)(given, call.count, loss_fn=_added_up, scale_grads=False)
    return made.step


def _added_up(losses: Tensor, _: Tensor) -> Tensor:
    """Add losses, so that the gradient at each is one."""
    return losses.sum()


class _Run:
    """One call: the stages at work, and the norms that they exchange."""

    def __init__(self, pipe: Pipelined, layout: _Layout, call: _Call) -> None:
        self._pipe, self._layout, self._call = pipe, layout, call
        dtype = dict(dtype=torch.float64, device=call.device)
        self._squares = {group: torch.zeros(call.size, **dtype) for group in layout.groups}  # type: ignore[call-overload]
        self._entered: dict[int, dict[int, Tensor]] = {}
        self._next = 0
        self._waiting: deque[tuple[int, list[Tensor], Any]] = deque()
        self.most_books = 0
        self.works = [
            StageWork(
                stage,
                pipe.stages[stage],
                params,
                _inputs(len(pipe.stages), stage, call.batch),
                received=stage > 0,
                last=stage == len(pipe.stages) - 1,
                mask=None if call.mask is None else call.mask.to(call.device),
                rows=call.size,
                size=pipe.microbatch_size,
                grouping=grouping,
                shared=[place for place, group in enumerate(kept) if group in layout.shared],
                choose=pipe._book_keeping.choose,
                done=lambda number, squares, position=position: self._done(position, number, squares),
            )
            for position, (stage, params, (grouping, kept)) in enumerate(
                zip(pipe.local, call.params, layout.groupings, strict=True)
            )
        ]

    def run(self) -> None:
        """Run the schedule, and settle all micro-batches."""
        numbers = torch.arange(self._call.count)
        first = (numbers,) if self._pipe.local[0] == 0 else ()
        for module, work in zip(self._layout.modules, self.works, strict=True):
            module.work = work
        try:
            self._layout.step(*first, number=numbers, target=numbers, return_outputs=False)
        except Exception as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, PegradError):
                reason = reason.__cause__
            if reason is None:
                raise
            raise reason from error
        finally:
            for module in self._layout.modules:
                module.work = None
        while self._waiting:
            self._settle()

    def values(self) -> tuple[Tensor, Tensor, None, Tensor]:
        """Return losses, norms, no aux, and the number of rows that were not finite."""
        call, pipe = self._call, self._pipe
        losses = torch.zeros(call.size, dtype=self._layout.dtype, device=call.device)
        last = len(pipe.stages) - 1
        if call.size:
            if last in pipe.local:
                found = self.works[-1].losses
                losses = torch.cat([found[number] for number in range(call.count)])
            dist.broadcast(losses, src=dist.get_global_rank(pipe.group, last % pipe.ranks), group=pipe.group)
        squares = torch.stack([self._squares[group] for group in self._layout.groups])
        if call.mask is not None:
            examples = call.mask.to(call.device)
            losses = losses.where(examples, 0)
            squares = squares.where(examples, 0)
        norms = squares.clamp(min=0).sqrt().to(accumulator(trees.leaves(call.params)[0].dtype))
        non_finite = (~torch.isfinite(squares).all(0)).sum()
        return losses, norms[0] if self._layout.together else norms, None, non_finite

    def _done(self, position: int, number: int, squares: Tensor) -> None:
        """Take note of a stage's squared norms `(m, G)`, and exchange them once all stages of this rank have theirs."""
        part = self._part(number)
        for group, column in zip(self._layout.groupings[position][1], squares.unbind(1), strict=True):
            if group not in self._layout.shared:
                self._squares[group][part] += column
        if not self._layout.shared:
            return
        self._entered.setdefault(number, {})[position] = squares
        while len(self._entered.get(self._next, ())) == len(self.works):  # all ranks exchange in one order
            self._exchange(self._next, self._entered.pop(self._next))
            self._next += 1

    def _exchange(self, number: int, entered: dict[int, Tensor]) -> None:
        shared = self._layout.shared
        sent = torch.zeros(len(self.works), self._pipe.microbatch_size, len(shared), dtype=torch.float64)
        sent = sent.to(self._call.device)
        for position, squares in entered.items():
            for place, group in enumerate(self._layout.groupings[position][1]):
                if group in shared:
                    sent[position, :, shared.index(group)] = squares[:, place]
        received = [torch.empty_like(sent) for _ in range(self._pipe.ranks)]
        self._waiting.append((number, received, dist.all_gather(received, sent, group=self._pipe.group, async_op=True)))
        self.most_books = max(self.most_books, *(work.books for work in self.works))
        while len(self._waiting) > len(self._pipe.stages) - 1:
            self._settle()

    def _settle(self) -> None:
        """Wait for the norms of the micro-batch that was exchanged longest ago, and let the stages sum it."""
        number, received, exchange = self._waiting.popleft()
        exchange.wait()
        by_stage = torch.stack(received, 1).flatten(0, 1)  # stage k is the k // ranks-th of rank k % ranks
        whole = by_stage.sum(0)
        for place, group in enumerate(self._layout.shared):
            if group in self._squares:
                self._squares[group][self._part(number)] = whole[:, place]
        for work, (_, kept) in zip(self.works, self._layout.groupings, strict=True):
            work.settle(number, torch.stack([self._squares[group][self._part(number)] for group in kept], 1))

    def _part(self, number: int) -> slice:
        size = self._pipe.microbatch_size
        return slice(number * size, (number + 1) * size)


def _inputs(stages: int, stage: int, batch: Any) -> tuple[Leaves, Any]:
    """Return what a stage takes from the batch: leaves, and the structure of its example."""
    if stages == 1:
        return trees.flatten(batch)
    if stage == 0:
        return trees.flatten(batch[0])
    x = torch.empty(0)
    if stage < stages - 1:
        return [], trees.flatten(x)[1]
    leaves, structure = trees.flatten((x, batch[1]))
    return leaves[1:], structure


def _exchange(value: Any, fine: bool, group: Any, device: torch.device) -> list[tuple[bool, tuple[int, ...]]]:
    """Tell every rank whether this one is fine, and a digest of a value: one small collective."""
    digest = hashlib.sha256(repr(value).encode()).digest()[:16]
    words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
    sent = torch.tensor([int(fine), *words], dtype=torch.int64, device=device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return [(bool(answer[0]), tuple(answer[1:].tolist())) for answer in received]


def _checked(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    stages = tuple(stages)
    if not stages or not all(map(callable, stages)):
        raise ArgumentError("Expected stages to be at least one function stage(params, x)")
    return stages


def _group(mesh: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            "Expected torch.distributed to be initialised: call torch.distributed.init_process_group first, or use "
            "clipped_grad(compose(stages), ...) on one process"
        )
    if mesh is None:
        return dist.group.WORLD
    if not hasattr(mesh, "get_group"):
        return mesh
    if mesh.ndim != 1:
        raise ArgumentError(f"Expected mesh to have one dimension, got {mesh.ndim}: pass mesh['pipe'], say")
    return mesh.get_group()
