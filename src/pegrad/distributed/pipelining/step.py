"""The private step whose stages live on the ranks of a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from pegrad import random
from pegrad.distributed.groups import Mesh, group_of
from pegrad.distributed.pipelining.clipped import Pipelined, pipeline
from pegrad.distributed.pipelining.layout import Stage
from pegrad.dp_sgd import DPSGD, State
from pegrad.errors import ArgumentError
from pegrad.trees import PyTree


def pipelined(
    step: DPSGD, stages: Sequence[Stage], mesh: Mesh = None, *, microbatch_size: int, schedule: str = "1F1B"
) -> "PipelinedStep":
    """Make of the private step of `compose(stages)` one whose stages live on the ranks of a pipeline.

    Args:
        step: of `pegrad.dp_sgd(compose(stages), ...)`, made alike on every rank. Its strategy is not used.
        stages: see `pipeline`.
        mesh: see `pipeline`.
        microbatch_size: see `pipeline`.
        schedule: see `pipeline`.

    Returns:
        A `PipelinedStep`, called like `DPSGD` with the parameters of this rank's stages. On a mesh of two dimensions
        `data_parallel(pipelined(step, stages, mesh["pipe"], ...), mesh["data"])` splits the batch as well.

    Raises:
        ArgumentError: clipping is adaptive; or as `pipeline`.

    Guarantee: see `PipelinedStep`.
    """
    if not isinstance(step, DPSGD):
        raise ArgumentError(f"Expected step to be a DPSGD of pegrad.dp_sgd, got {type(step).__name__}")
    if step.adaptive is not None:
        raise ArgumentError(
            "Expected a clip norm that stays as it is, got Adaptive: no rank of a pipeline has all norms"
        )
    clipped = step.clipped_grad
    staged = pipeline(
        stages,
        mesh,
        clip_norm=clipped.clipping,
        microbatch_size=microbatch_size,
        schedule=schedule,
        normalize_by=clipped.normalize_by,
    )
    given: dict[str, Any] = {field.name: getattr(step, field.name) for field in fields(step)}
    return PipelinedStep(**given | {"clipped_grad": staged}, place=group_of(mesh).rank)


@dataclass(frozen=True)
class PipelinedStep(DPSGD):
    """A step of differentially private SGD on a pipeline. Made by `pipelined`.

    Guarantee: that of `DPSGD`, for the parameters of all stages together: each stage gets noise of the stated law,
    independent of every other's, since each rank's key is derived from the run's key and its place in the pipeline.
    Bound to `test_a_pipeline_by_data_parallel_takes_the_step_of_one_process` and
    `test_stages_get_noise_of_their_own`.
    """

    place: int = 0
    """The rank's place in the pipeline."""

    def init(self, params: PyTree, key: Tensor) -> State:
        """Return the state before the first step.

        Args:
            params: a list with the parameters of each of this rank's stages.
            key: the run's key, the same on every rank.

        Raises:
            ArgumentError, LeafError: as `DPSGD.init`.
        """
        return super().init(params, random.fold_in(key, self.place))

    def clipped_at(self, state: State) -> Pipelined:  # type: ignore[override]
        """See `DPSGD.clipped_at`."""
        clipped: Any = self.clipped_grad
        return clipped
