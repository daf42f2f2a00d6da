"""The private step whose stages live on the ranks of a pipeline."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pegrad import random
from pegrad.distributed.agreement import Agreement
from pegrad.distributed.groups import Group, Mesh
from pegrad.distributed.pipelining.clipped import pipeline
from pegrad.distributed.pipelining.layout import Stage
from pegrad.dp_sgd import DPSGD, Release, State
from pegrad.errors import ArgumentError
from pegrad.random.keys import key_bytes
from pegrad.ranks import Ranks
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
    return PipelinedStep(**given | {"clipped_grad": staged})


@dataclass(frozen=True)
class PipelinedStep(DPSGD):
    """A step of differentially private SGD on a pipeline. Made by `pipelined`.

    Guarantee: that of `DPSGD`, for the parameters of all stages together: each stage gets noise of the stated law,
    independent of every other's, since each rank's key is derived from the run's key and its place in the pipeline;
    and all ranks take one step. Bound to `test_a_pipeline_by_data_parallel_takes_the_step_of_one_process`,
    `test_stages_get_noise_of_their_own` and `test_the_ranks_of_a_pipeline_take_one_step`.
    """

    @property
    def group(self) -> Group:
        """The ranks of the pipeline."""
        staged: Any = self.clipped_grad
        return staged.settings.group

    def release_among(
        self, ranks: Ranks, params: PyTree, state: State, microbatches: Iterable[tuple[int, Any]]
    ) -> Release:
        """See `DPSGD.release_among`: the pipeline's ranks agree on the step, and each derives a key of its own.

        Raises:
            AgreementError: on every rank, if they do not have the same key, step, σ, batch size or sampler.
            ArgumentError, LeafError, LossError: as `DPSGD`.
        """
        Agreement(self.group).reach(
            {
                "key": key_bytes(state.key),
                "number of the step": state.step,
                "clip norm": self.clipped_grad.clipping,
                "noise multiplier": self.gradient_noise_multiplier,
                "expected batch size": self.clipped_grad.normalize_by,
                "sampler": self.sampler,
            }
        )
        own = state._replace(key=random.fold_in(state.key, self.group.rank))
        released = super().release_among(ranks, params, own, microbatches)
        return released._replace(state=released.state._replace(key=state.key))
