"""One call of a pipeline: its stages at work, and the norms that they exchange."""

from collections import deque
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pegrad import trees
from pegrad.distributed.pipelining.layout import Given, Layout, Settings
from pegrad.distributed.pipelining.stage import StageWork
from pegrad.errors import PegradError
from pegrad.numerics import accumulator
from pegrad.plan.plan import Choose
from pegrad.problem import Leaves


class Run:
    """Runs a schedule once.

    Where leaves of several stages are clipped together, the squared norms of a micro-batch are exchanged as soon as all
    stages of this rank have theirs, in the background; and the micro-batch is settled K - 1 micro-batches later, K
    being the number of stages. By then every other stage can have had its turn. To wait for an earlier one would keep
    from the other stages what they need to get there.

    Args:
        settings: the pipeline.
        layout: of this call.
        given: the call's arguments, at least one row.
        choose: how norms are found.
    """

    def __init__(self, settings: Settings, layout: Layout, given: Given, choose: Choose) -> None:
        self._settings, self._layout, self._given = settings, layout, given
        zeros = torch.zeros(given.size, dtype=torch.float64, device=given.device)
        self._squares = {group: zeros.clone() for group in layout.groups}
        self._entered: dict[int, dict[int, Tensor]] = {}
        self._next = 0
        self._waiting: deque[tuple[int, list[Tensor], Any]] = deque()
        self._lag = len(settings.stages) - 1
        last = len(settings.stages) - 1
        self._works = [
            StageWork(
                stage,
                settings.stages[stage],
                params,
                _inputs(stage, last, given.batch),
                received=stage > 0,
                last=stage == last,
                output=layout.outputs[stage],
                mask=None if given.mask is None else given.mask.to(given.device),
                rows=given.size,
                size=settings.microbatch_size,
                grouping=grouping,
                shared=[place for place, group in enumerate(kept) if group in layout.shared],
                choose=choose,
                done=partial(self._done, position),
            )
            for position, (stage, params, (grouping, kept)) in enumerate(
                zip(settings.local, given.params, layout.groupings, strict=True)
            )
        ]

    def run(self) -> None:
        """Run the schedule, and settle all micro-batches."""
        assert self._layout.step is not None, "there is a micro-batch"
        numbers = torch.arange(self._given.microbatches)
        first = (numbers,) if self._settings.local[0] == 0 else ()
        for module, work in zip(self._layout.modules, self._works, strict=True):
            module.work = work
        try:
            self._layout.step(*first, number=numbers, target=numbers, return_outputs=False)
        except Exception as error:
            reason: BaseException | None = error  # the schedule wraps what a stage raises
            while reason is not None and not isinstance(reason, PegradError):
                reason = reason.__cause__
            if reason is None:
                raise
            raise reason from None
        finally:
            for module in self._layout.modules:
                module.work = None
        while self._waiting:
            self._settle()

    def sums(self) -> Leaves:
        """Return the weighted sum for each leaf of the local stages."""
        return [leaf for work in self._works for leaf in work.total]

    def losses(self) -> Tensor:
        """Return every example's loss, `(B,)`, on every rank; 0 for padding."""
        given, last = self._given, len(self._settings.stages) - 1
        losses = torch.zeros(given.size, dtype=self._layout.outputs[last][1], device=given.device)
        if given.size:
            if last in self._settings.local:
                found = self._works[-1].losses
                losses = torch.cat([found[number] for number in range(given.microbatches)])
            dist.broadcast(losses, src=self._settings.home(last), group=self._settings.group.process_group)
        return self._examples(losses)

    def norms(self) -> Tensor:
        """Return the norms, `(G, B)`, of the clipping groups that local leaves are in; 0 for padding."""
        dtype = accumulator(trees.leaves(self._given.params)[0].dtype)
        return self._examples(self._stacked()).clamp(min=0).sqrt().to(dtype)

    def non_finite(self) -> Tensor:
        """Return how many examples were not finite in one of those groups."""
        return (~torch.isfinite(self._examples(self._stacked())).all(0)).sum()

    def _stacked(self) -> Tensor:
        return torch.stack([self._squares[group] for group in self._layout.groups])

    def _examples(self, values: Tensor) -> Tensor:
        mask = self._given.mask
        return values if mask is None else values.where(mask.to(values.device), 0)

    def _done(self, position: int, number: int, squares: Tensor) -> None:
        """Take note of the squared norms `(m, G)` of one of this rank's stages."""
        shared, part = self._layout.shared, self._part(number)
        for group, column in zip(self._layout.groupings[position][1], squares.unbind(1), strict=True):
            if group not in shared:
                self._squares[group][part] = column
        if not shared:
            return
        self._entered.setdefault(number, {})[position] = squares
        while len(self._entered.get(self._next, ())) == len(self._works):  # all ranks exchange in one order
            self._exchange(self._next, self._entered.pop(self._next))
            self._next += 1
        while len(self._waiting) > self._lag:
            self._settle()

    def _exchange(self, number: int, entered: dict[int, Tensor]) -> None:
        """Begin to exchange a micro-batch's squared norms: those of every stage, for they are added in one order."""
        shared, rows = self._layout.shared, self._settings.microbatch_size
        shape = (len(self._works), rows, len(shared))
        sent = torch.zeros(shape, dtype=torch.float64, device=self._given.device)
        for position, squares in entered.items():
            for place, group in enumerate(self._layout.groupings[position][1]):
                if group in shared:
                    sent[position, :, shared.index(group)] = squares[:, place]
        received = [torch.empty_like(sent) for _ in range(self._settings.ranks)]
        exchange = dist.all_gather(received, sent, group=self._settings.group.process_group, async_op=True)
        self._waiting.append((number, received, exchange))

    def _settle(self) -> None:
        """Wait for the norms of the micro-batch that was exchanged longest ago, and let the stages sum it."""
        number, received, exchange = self._waiting.popleft()
        exchange.wait()
        by_stage = torch.stack(received, 1).flatten(0, 1)  # stage k is the k // ranks-th of rank k % ranks
        part = self._part(number)
        for group, whole in zip(self._layout.shared, by_stage.sum(0).unbind(1), strict=True):
            if group in self._squares:
                self._squares[group][part] = whole
        for work, (_, kept) in zip(self._works, self._layout.groupings, strict=True):
            if work.shares:
                work.settle(number, torch.stack([self._squares[group][part] for group in kept], 1))

    def _part(self, number: int) -> slice:
        size = self._settings.microbatch_size
        return slice(number * size, (number + 1) * size)


def _inputs(stage: int, last: int, batch: Any) -> tuple[Leaves, Any]:
    """Return what a stage takes from the batch: leaves, and the structure of its example."""
    if last == 0:
        return trees.flatten(batch)
    if stage == 0:
        return trees.flatten(batch[0])
    x = torch.empty(0)
    if stage < last:
        return [], trees.flatten(x)[1]
    leaves, structure = trees.flatten((x, batch[1]))
    return leaves[1:], structure
