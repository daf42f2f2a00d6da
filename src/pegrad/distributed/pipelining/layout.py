"""What all ranks of a pipeline settle before its first call: what goes from stage to stage, what is clipped together.

Nothing here depends on the numbers of a batch, only on shapes, so it is kept from call to call.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pegrad import trees
from pegrad.clipping import Clipping, Grouping, grouping_of
from pegrad.distributed.groups import Group
from pegrad.distributed.pipelining.stage import StageModule, check_output, trace_stage
from pegrad.errors import ArgumentError, LossError
from pegrad.problem import Problem
from pegrad.tracing.generators import Generators
from pegrad.tracing.loss import FlatLoss

Stage = Callable[[Any, Any], Tensor]
"""`stage(params, x) -> x` of one example; the last one `stage(params, (x, target)) -> scalar loss`."""

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble")
ONE_STAGE_A_RANK = ("GPipe", "1F1B")


@dataclass(frozen=True, eq=False)
class Settings:
    """A pipeline as it was asked for."""

    stages: tuple[Stage, ...]
    group: Group
    clipping: Clipping
    microbatch_size: int
    schedule: str
    normalize_by: float

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.group.size

    @property
    def local(self) -> tuple[int, ...]:
        """The stages of this rank."""
        return tuple(range(self.group.rank, len(self.stages), self.ranks))

    def home(self, stage: int) -> int:
        """Return the rank, among all processes, on which a stage lives."""
        return self.group.home(stage % self.ranks)


class Given(NamedTuple):
    """The arguments of a call, checked."""

    params: Any  # a pytree for each local stage
    batch: Any
    mask: Tensor | None
    size: int
    microbatches: int
    device: torch.device
    key: Any  # what a layout depends on


class _Meta(NamedTuple):
    """What all ranks know of a stage."""

    params: Any  # a pytree of tensors without numbers
    shape: tuple[int, ...]  # of one example's output
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Layout:
    """What stays the same from call to call."""

    step: Callable[..., Any] | None
    """The schedule's; None where there is no micro-batch."""
    modules: list[StageModule]
    """Of the local stages."""
    groupings: list[tuple[Grouping, list[int]]]
    """For each local stage the clipping groups of its leaves, and which ones of all they are."""
    shared: list[int]
    """The groups that leaves of several stages are in."""
    groups: list[int]
    """The groups that local leaves are in."""
    names: tuple[str, ...] | None
    """Of `groups`; None where all leaves are clipped together."""
    outputs: list[tuple[tuple[int, ...], torch.dtype]]
    """Of every stage, what one example's output is like."""


def arrange(settings: Settings, given: Given) -> Layout:
    """Set everything up, on every rank at once.

    Raises:
        ArgumentError, LeafError: the clipping does not fit the parameters of all stages, or differs between ranks.
        LossError: a stage returns anything but one tensor, does not depend on its parameters, or uses a tensor that
            requires a gradient and is none of them. Every rank raises.
    """
    metas = _metas(settings, given)
    grouping = grouping_of(settings.clipping, [meta.params for meta in metas])
    bounds = [(w.bound, w.floor, type(w).__name__) for w in grouping.weightings]
    if len({answer.digest for answer in told((grouping.of, bounds), settings.group)}) > 1:
        raise ArgumentError("Expected clip_norm to be the same on every rank, got clippings of different groups")
    owners = [stage for stage, meta in enumerate(metas) for _ in trees.leaves(meta.params)]
    homes: list[set[int]] = [set() for _ in grouping.weightings]
    for owner, group in zip(owners, grouping.of, strict=True):
        homes[group].add(owner)
    scaled = grouping.over(settings.normalize_by)
    groupings = [_restricted(scaled, [owner == stage for owner in owners]) for stage in settings.local]
    groups = sorted({group for _, kept in groupings for group in kept})
    modules = [StageModule() for _ in settings.local]
    return Layout(
        _step(settings, given, metas, modules) if given.microbatches else None,
        modules,
        groupings,
        [group for group, stages in enumerate(homes) if len(stages) > 1],
        groups,
        None if grouping.names is None else tuple(grouping.names[group] for group in groups),
        [(meta.shape, meta.dtype) for meta in metas],
    )


class Answer(NamedTuple):
    """What a rank says before a call."""

    fine: bool
    ready: bool
    digest: tuple[int, ...]


def told(value: Any, group: Group, *, fine: bool = True, ready: bool = True) -> list[Answer]:
    """Tell every rank a digest of a value, and hear theirs: one small collective.

    Args:
        value: anything whose `repr` is the same where it is the same.
        group: the ranks.
        fine: whether this rank can go on.
        ready: whether it has its layout.
    """
    digest = hashlib.sha256(repr(value).encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
    sent = torch.tensor([fine, ready, *words], dtype=torch.int64, device=group.device)
    return [Answer(bool(r[0]), bool(r[1]), tuple(r[2:].tolist())) for r in group.all(sent)]


def _restricted(grouping: Grouping, keep: list[bool]) -> tuple[Grouping, list[int]]:
    """Restrict clipping groups to some leaves; return them, and for each which one it is in `grouping`."""
    of = [group for group, kept in zip(grouping.of, keep, strict=True) if kept]
    kept = sorted({*of})
    names = None if grouping.names is None else tuple(grouping.names[group] for group in kept)
    weightings = tuple(grouping.weightings[group] for group in kept)
    return Grouping(tuple(kept.index(group) for group in of), weightings, names), kept


def _metas(settings: Settings, given: Given) -> list[_Meta]:
    """Run every stage on one example of zeros, in order, and tell all ranks what came out."""
    zeros = trees.map(lambda rows: rows.new_zeros(rows.shape[1:]), given.batch)
    metas: list[_Meta] = []
    for stage in range(len(settings.stages)):
        found: list[Any] = [None]
        failure: Exception | None = None
        if stage in settings.local:
            before = Generators.now()
            try:
                found = [_meta(settings, stage, given, zeros, metas)]
            except Exception as error:
                failure = error
            before.restore()
        dist.broadcast_object_list(
            found, src=settings.home(stage), group=settings.group.process_group, device=given.device
        )
        if failure is not None:
            raise failure
        if found[0] is None:
            raise LossError(f"Stage {stage} cannot run; rank {stage % settings.ranks} says why")
        metas.append(found[0])
    return metas


def _meta(settings: Settings, stage: int, given: Given, zeros: Any, metas: list[_Meta]) -> _Meta:
    last = stage == len(settings.stages) - 1
    x = torch.zeros(metas[-1].shape, dtype=metas[-1].dtype, device=given.device) if metas else None
    example = zeros if len(settings.stages) == 1 else zeros[0] if x is None else (x, zeros[1]) if last else x
    leaves, spec = trees.flatten_params(given.params[settings.local.index(stage)])
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    rows, structure = trees.flatten(example)
    loss = FlatLoss(settings.stages[stage], spec, structure, lambda value: check_output(stage, value, last=last))
    with torch.enable_grad():
        value, aux = loss(leaves, rows)
    if aux:
        check_output(stage, (value, aux), last=last)
    loss.check_dependence()
    problem = Problem(loss, leaves, [row[None] for row in rows])
    trace_stage(stage, problem, set(), received=stage > 0)  # so that what it cannot do, it cannot do on all ranks
    shapes = [torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") for leaf in leaves]
    return _Meta(trees.unflatten(spec, shapes), tuple(value.shape), value.dtype)


def _step(settings: Settings, given: Given, metas: list[_Meta], modules: list[StageModule]) -> Callable[..., Any]:
    """Make PyTorch's stages and schedule, with the shapes that go between them."""
    from torch.distributed.pipelining import PipelineStage  # here, for it brings the compiler along
    from torch.distributed.pipelining.schedules import get_schedule_class

    def output(stage: int) -> Tensor:
        shape = (settings.microbatch_size, *metas[stage].shape)
        return torch.empty(shape, dtype=metas[stage].dtype, device=given.device, requires_grad=True)

    stages = [
        PipelineStage(
            module,
            stage,
            len(settings.stages),
            given.device,
            input_args=output(stage - 1) if stage else torch.zeros(1, dtype=torch.int64),
            output_args=output(stage),
            group=settings.group.process_group,
        )
        for stage, module in zip(settings.local, modules, strict=True)
    ]
    one = settings.schedule in ONE_STAGE_A_RANK
    kind: Any = get_schedule_class(settings.schedule)
    return kind(stages[0] if one else stages, given.microbatches, loss_fn=_added_up, scale_grads=False).step


def _added_up(losses: Tensor, _: Tensor) -> Tensor:
    """Add losses, so that the gradient at each is one."""
    return losses.sum()
