"""Clipped gradients of a model that is cut into stages, one or several to a process: pipelining with privacy.

A stage is a pure function of its own parameters and one example. `compose` puts the stages together to an ordinary
loss, whose `clipped_grad` says what every schedule must come to. `pipeline` runs them where they live, driven by the
schedules of `torch.distributed.pipelining`. What goes from stage to stage is each example's activation and the gradient
there; norms go only where leaves of several stages are clipped together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pegrad import trees
from pegrad._validate import check_integer, check_scale
from pegrad.accumulation import Added, Sums, extended, nothing, total
from pegrad.clipping import Clipping, as_clipping
from pegrad.distributed.groups import Group, Mesh, group_of
from pegrad.distributed.pipelining.layout import (
    ONE_STAGE_A_RANK,
    SCHEDULES,
    Given,
    Layout,
    Settings,
    Stage,
    arrange,
    told,
)
from pegrad.distributed.pipelining.run import Run
from pegrad.errors import ArgumentError, LeafError, PegradError
from pegrad.per_example import Clipped, Loss
from pegrad.strategies.book_keeping import BookKeeping
from pegrad.torch_internals import transformed
from pegrad.tracing.eager import outermost
from pegrad.trees import PyTree


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
    stages = _checked_stages(stages)

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
    mesh: Mesh = None,
    *,
    clip_norm: float | Clipping,
    microbatch_size: int,
    schedule: str = "1F1B",
    normalize_by: float = 1.0,
) -> "Pipelined":
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
    (per-device clipping); Lee et al. 2021, NanoBatch (micro-batches). The schedules are PyTorch's: Huang et al. 2019
    (GPipe), Narayanan et al. 2021 (1F1B, interleaved), Qi et al. 2023 (zero bubble).
    """
    stages = _checked_stages(stages)
    clipping = as_clipping(clip_norm)
    check_scale("normalize_by", normalize_by)
    check_integer("microbatch_size", microbatch_size, 1)
    if schedule not in SCHEDULES:
        raise ArgumentError(f"Expected schedule to be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    settings = Settings(stages, _group(mesh), clipping, microbatch_size, schedule, normalize_by)
    one = schedule in ONE_STAGE_A_RANK
    if len(stages) != settings.ranks if one else len(stages) % settings.ranks:
        raise ArgumentError(
            f"Expected {'as many stages as ranks' if one else 'a multiple of the number of ranks'} with schedule "
            f"{schedule!r}, got {len(stages)} stages for {settings.ranks} ranks. Several stages a rank are for "
            "Interleaved1F1B and InterleavedZeroBubble"
        )
    return Pipelined(settings)


@dataclass(frozen=True, eq=False)
class Pipelined:
    """The sum of a batch's clipped gradients, over a public constant, stage by stage. Made by `pipeline`.

    Every rank calls it at once, with the parameters of its own stages. Each gets their part of the sum; the parts
    together are `clipped_grad(compose(stages), clip_norm=...)`, up to rounding. It fits where a `ClippedGrad` does, and
    for a step of DP-SGD each rank adds noise to its part: standard deviation noise multiplier times `sensitivity`,
    which is that of all parts together, under a key of its own.

    Of the batch, the first stage reads the input and the last one the target. Where leaves of several stages are
    clipped together, the squared norms of a micro-batch are exchanged while later ones are computed, and what its sum
    needs is kept until they are known: for at most as many micro-batches as there are stages, and on a rank with
    several stages one round more.

    Arguments that any rank refuses, or that differ, end the call on every rank. An error in the middle of a schedule
    ends it on the others at the group's time-out, and the group is of no use afterwards.

    Guarantee: for batches that differ by one example, added or removed, the Euclidean distance of the two sums, over
    the leaves of all stages, is at most `sensitivity`, up to rounding, whatever the example is. An example that is not
    finite in a clipping group contributes zero there, on every rank. Bound to
    `test_every_schedule_gives_the_clipped_sum_of_the_composed_loss` and
    `test_a_hostile_row_moves_the_sum_by_at_most_the_sensitivity`.
    """

    settings: Settings
    _layouts: dict[Any, Layout] = field(default_factory=dict, init=False, repr=False)
    _book_keeping: BookKeeping = field(default_factory=BookKeeping, init=False, repr=False)

    @property
    def clipping(self) -> Clipping:
        """How gradients are clipped."""
        return self.settings.clipping

    @property
    def normalize_by(self) -> float:
        """The public constant that the sum is divided by."""
        return self.settings.normalize_by

    @property
    def microbatch_size(self) -> int:
        """Examples that go through a stage at a time."""
        return self.settings.microbatch_size

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the sums of all stages taken together."""
        return self.clipping.sensitivity / self.normalize_by

    @property
    def local(self) -> tuple[int, ...]:
        """The stages of this rank: `params` is a list with a pytree for each."""
        return self.settings.local

    def groups(self, params: PyTree, batch: PyTree) -> tuple[str, ...]:
        """Name the clipping groups that this rank's leaves fall into, on every rank at once.

        Args:
            params: as for a call.
            batch: as for a call.

        Returns:
            A name for each row of norms `(G, B)`; `("params",)` where all leaves are clipped together.

        Raises:
            ArgumentError, LeafError, LossError: as a call.
        """
        return self._layout(self._agreed(params, batch, None)).names or ("params",)

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
            StrategyError: examples take different paths through a stage, or it cannot run on all at once.
        """
        sums, *values = self.add(self.init(params), params, batch, mask)
        return Clipped(self.finish(sums), *values)

    def init(self, params: PyTree) -> Sums:
        """Begin a sum over a batch that arrives in parts.

        Raises:
            LeafError: a leaf of `params` is no floating-point tensor.
        """
        return nothing(params)

    @outermost
    def add(self, sums: Sums, params: PyTree, batch: PyTree, mask: Tensor | None = None) -> Added:
        """Add one part's clipped gradients, on every rank at once, and return new sums.

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
        given = self._agreed(params, batch, mask)
        layout = self._layout(given)
        run = Run(self.settings, layout, given, self._book_keeping.choose)
        if given.size:
            with torch.enable_grad():
                run.run()
        norms = run.norms()
        return Added(
            extended(sums, trees.leaves(params), run.sums(), given.size),
            run.losses(),
            norms[0] if layout.names is None else norms,
            None,
            run.non_finite(),
        )

    def finish(self, sums: Sums) -> PyTree:
        """Return the sum of all that was added, for this rank's stages: what `Clipped.grads` is."""
        return total(sums)

    def _agreed(self, params: PyTree, batch: PyTree, mask: Tensor | None) -> Given:
        """Check the arguments, and that every rank was given the same: all raise, or none does.

        Raises:
            ArgumentError, LeafError: see `__call__`.
        """
        settings, failure, given = self.settings, None, None
        try:
            given = _checked(settings, params, batch, mask)
        except PegradError as error:
            failure = error
        same = given and (given.size, None if mask is None else mask.tolist())
        static = (len(settings.stages), settings.schedule, settings.microbatch_size, self.normalize_by)
        answers = told(
            (static, type(self.clipping).__name__, self.clipping.sensitivity, same),
            settings.group,
            fine=given is not None,
            ready=given is not None and given.key in self._layouts,
        )
        if failure is not None:
            raise failure
        assert given is not None, "it was checked"
        refused = [rank for rank, answer in enumerate(answers) if not answer.fine]
        if refused:
            raise ArgumentError(f"Rank {refused[0]} of the pipeline refused its arguments, and says there why")
        if len({answer.digest for answer in answers}) > 1:
            raise ArgumentError(
                "Expected every rank to be given the same: batches of one size with one mask, and pipelines of the "
                "same number of stages, schedule, microbatch_size, clip_norm and normalize_by. They differ"
            )
        if not all(answer.ready for answer in answers):
            self._layouts.clear()  # what one rank must set up, all do; and only one layout's buffers are kept
        return given

    def _layout(self, given: Given) -> Layout:
        if given.key not in self._layouts:
            self._layouts[given.key] = arrange(self.settings, given)
        return self._layouts[given.key]


def _checked(settings: Settings, params: PyTree, batch: PyTree, mask: Tensor | None) -> Given:
    if transformed():
        raise ArgumentError("A pipeline cannot run under a transform of torch.func (grad, vmap, jvp, ...)")
    local = settings.local
    if not isinstance(params, list | tuple) or len(params) != len(local):
        raise LeafError(
            f"params is no list of {len(local)}: expected a pytree of parameters for each stage of this rank, which "
            f"are {', '.join(map(str, local))}"
        )
    shapes: list[Any] = []
    for its_params in params:
        leaves, structure = trees.flatten_params(its_params)
        shapes.append((structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))
    if len(settings.stages) > 1 and not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise LeafError(f"batch is of type {type(batch).__name__}: expected a pair (input, target)")
    rows, structure, size = trees.flatten_batch(batch)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (size,)):
        raise LeafError(f"mask is no boolean tensor ({size},): True for examples and False for padding")
    if size % settings.microbatch_size:
        raise ArgumentError(
            f"Expected a batch of a multiple of microbatch_size={settings.microbatch_size} rows, got {size}: every "
            "micro-batch has one shape. Pad the batch, and mask the padding"
        )
    count = size // settings.microbatch_size
    _check_count(settings, count)
    device = _device(params)
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    key = (count, *shapes, structure, tuple((row.shape[1:], row.dtype) for row in rows), autocast)
    return Given(params, batch, mask, size, count, device, key)


def _check_count(settings: Settings, count: int) -> None:
    """Check that the schedule takes so many micro-batches; none at all is an empty batch."""
    stages, rounds = len(settings.stages), max(1, count // settings.ranks)
    if settings.schedule == "1F1B" and 0 < count < stages:
        raise ArgumentError(
            f"Expected at least {stages} micro-batches, one for each stage, with schedule '1F1B', got {count}: use a "
            "smaller microbatch_size, or 'GPipe'"
        )
    if settings.schedule not in ONE_STAGE_A_RANK and count % rounds:
        raise ArgumentError(
            f"Expected a number of micro-batches that falls into {rounds} equal rounds with schedule "
            f"{settings.schedule!r} on {settings.ranks} ranks, got {count}: a multiple of the number of ranks does"
        )


def _device(params: PyTree) -> torch.device:
    return next((leaf.device for leaf in trees.leaves(params) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _checked_stages(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    stages = tuple(stages)
    if not stages or not all(map(callable, stages)):
        raise ArgumentError("Expected stages to be at least one function stage(params, x)")
    return stages


def _group(mesh: Mesh) -> Group:
    group = group_of(mesh)
    if group.process_group is None:
        raise ArgumentError(
            "Expected torch.distributed to be initialised: call torch.distributed.init_process_group first, or use "
            "clipped_grad(compose(stages), ...) on one process"
        )
    return group
