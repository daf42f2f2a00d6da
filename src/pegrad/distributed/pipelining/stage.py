"""One stage of a pipeline at work: traced forward, then run backward from the gradient at its output.

To the schedule that drives it a stage is one `autograd.Function`, with no parameter that autograd knows. Its forward
pass is a trace of the stage over a micro-batch. Its backward pass is given the gradient at each example's output,
which the next stage has sent, and runs the trace backward from there: sites find norms and sums as in `book_keeping`,
and the gradient at the input goes to the stage before.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegrad import trees
from pegrad.accumulation import extended, nothing
from pegrad.clipping import Grouping
from pegrad.errors import LossError, PegradError, StrategyError
from pegrad.numerics import arithmetic
from pegrad.plan.candidates import Candidate
from pegrad.plan.parts import Part
from pegrad.plan.plan import Choose, Group
from pegrad.problem import Leaves, Problem
from pegrad.reductions.kept import KeptSums
from pegrad.reductions.native import stacked_pieces
from pegrad.rules import RULES
from pegrad.strategies.failures import out_of_memory, reason
from pegrad.strategies.traced import Traced
from pegrad.torch_internals import unsafe_view
from pegrad.tracing.generators import Generators
from pegrad.tracing.loss import FlatLoss
from pegrad.tracing.questions import Split
from pegrad.tracing.trace import Trace
from pegrad.trees import PyTree


class StageSums(KeptSums):
    """Norms and weighted sums of a stage's leaves; what is clipped together with other stages' waits for their norms.

    Args:
        trace: see `Norms`.
        problem: see `Norms`.
        choose: see `Norms`.
        grouping: the clipping groups of this stage's leaves.
        shared: the groups that other stages have leaves in too.

    Guarantee: no leaf of a shared group is weighed by the norm over this stage's leaves alone. Bound to
    `test_every_schedule_gives_the_clipped_sum_of_the_composed_loss`.
    """

    def __init__(
        self, trace: Trace, problem: Problem, choose: Choose, grouping: Grouping, shared: Collection[int]
    ) -> None:
        super().__init__(trace, problem, choose, grouping)
        self._waits = set(shared)

    def settle(self, squares: Tensor) -> Leaves:
        """Return the weighted sum for each leaf.

        Args:
            squares: `(m, G)`, float64: each group's squared norms over the leaves of all stages.
        """
        self._squares = list(squares.unbind(1))
        self._waits.clear()
        return self.total()

    def _enter_kept(self, group: Group, choice: Candidate, parts: list[Part], together: int) -> None:
        if together in self._waits:
            self._enter_rows(together, group.source, stacked_pieces(choice.kernels, parts, self.batch))
        else:
            super()._enter_kept(group, choice, parts, together)

    def _sum(self, together: int) -> None:
        if together not in self._waits:
            super()._sum(together)


@dataclass(eq=False)
class Book:
    """What is kept of one micro-batch."""

    problem: Problem
    start: Generators
    """Where the generators were before the forward pass."""
    trace: Trace | None
    sums: StageSums | None = None


class StageWork:
    """One stage in one call: every micro-batch goes through it forward, then backward, then is settled.

    Args:
        index: which stage it is.
        stage: `stage(params, x)`, a pure function of one example.
        params: its parameters.
        inputs: what comes from the batch and not from the stage before: `(leaves, structure)`, each `(B, ...)`; an
            empty list of leaves for a stage in the middle.
        received: whether `x` comes from the stage before; the structure is then that of `x` or of `(x, target)`.
        last: whether its output is the loss.
        output: the shape and the dtype of one example's output, as the other stages have been told.
        mask: `(B,)`, or None.
        rows: B.
        size: m, the rows of a micro-batch.
        grouping: the clipping groups of its leaves.
        shared: the groups that other stages have leaves in too.
        choose: how norms are found.
        done: called with the number of a micro-batch and its squared norms `(m, G)` once it has been through backward.
    """

    def __init__(
        self,
        index: int,
        stage: Callable[[Any, Any], Tensor],
        params: PyTree,
        inputs: tuple[Leaves, Any],
        *,
        received: bool,
        last: bool,
        output: tuple[tuple[int, ...], torch.dtype],
        mask: Tensor | None,
        rows: int,
        size: int,
        grouping: Grouping,
        shared: Collection[int],
        choose: Choose,
        done: Callable[[int, Tensor], None],
    ) -> None:
        self.leaves, spec = trees.flatten_params(params)
        self.index = index
        self.losses: dict[int, Tensor] = {}
        self._inputs, structure = inputs
        self._loss = FlatLoss(stage, spec, structure, lambda value: check_output(index, value, last=last))
        self._received, self._last, self._output = received, last, output
        self._mask, self._rows, self._size = mask, rows, size
        self._grouping, self._shared = grouping, shared
        self._choose, self._done = choose, done
        self._apart: set[int] = set()
        self._books: dict[int, Book] = {}
        self._sums = nothing(self.leaves)

    @property
    def shares(self) -> bool:
        """Whether other stages' norms are needed for its sums."""
        return bool(self._shared)

    @property
    def total(self) -> Leaves:
        """The weighted sum of all micro-batches that were settled, leaf by leaf."""
        return list(self._sums.grads)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """Run the stage over micro-batch `number`.

        Args:
            number: 0 for the batch's first m rows, and so on.
            x: `(m, ...)`, what the stage before has put out; ignored by the first.

        Returns:
            The output of every example, `(m, ...)`, cut off from the graph.

        Raises:
            LossError, StrategyError: see `trace_stage`; or the output is not what is expected.
        """
        part = slice(number * self._size, (number + 1) * self._size)
        rows = [x.detach()] * self._received + [leaf[part] for leaf in self._inputs]
        mask = None if self._mask is None else self._mask[part]
        problem = Problem(self._loss, self.leaves, rows, mask, self._rows)
        book = self._books[number] = Book(problem, Generators.now(), None)
        book.trace = self._trace(problem)
        output = book.trace.losses.detach()
        if (output.shape[1:], output.dtype) != self._output:
            raise LossError(
                f"Stage {self.index} returned a tensor of shape {tuple(output.shape[1:])} and dtype {output.dtype}, "
                f"but before {self._output[0]} and {self._output[1]}: expected the same for every micro-batch"
            )
        if self._last:
            self.losses[number] = output
        # PyTorch 2.11 looks at strides: an axis of one example has any, be it contiguous or not. Nor may it be a view.
        return unsafe_view(output.contiguous(), output.shape)

    def backward(self, number: int, at: Tensor) -> Tensor | None:
        """Run micro-batch `number` backward.

        Args:
            number: as for `forward`.
            at: `(m, ...)`, the gradient of each example's loss at its output.

        Returns:
            The gradient at its input, `(m, ...)`; None for the first stage.
        """
        book = self._books[number]
        trace, book.trace = book.trace, None
        assert trace is not None, "a micro-batch goes backward once"
        while True:
            sums = StageSums(trace, book.problem, self._choose, self._grouping, self._shared)
            leaked = Traced.run_back(book.problem, trace, sums, at=at.detach())
            if not leaked:
                break
            self._apart |= leaked  # the stage uses them in a way that the trace cannot see
            now = Generators.now()
            book.start.restore()  # the next stage has been given what came of these random numbers
            trace = self._trace(book.problem)
            now.restore()
        book.sums = sums
        grads = trace.input_grads
        del trace
        with arithmetic(book.problem.device):
            squares = sums.squared_norms()
        if not self._shared:
            self.settle(number, squares)
        self._done(number, squares)
        return grads[0] if self._received else None

    def settle(self, number: int, squares: Tensor) -> None:
        """Add the weighted sum of micro-batch `number`, and let go of what was kept for it.

        Args:
            number: as for `forward`.
            squares: `(m, G)`: the squared norms over the leaves of all stages.
        """
        book = self._books.pop(number)
        assert book.sums is not None, "a micro-batch is settled after its backward pass"
        with arithmetic(book.problem.device):
            self._sums = extended(self._sums, self.leaves, book.sums.settle(squares), self._size)

    def _trace(self, problem: Problem) -> Trace:
        return trace_stage(self.index, problem, self._apart, received=self._received)


def trace_stage(stage: int, problem: Problem, apart: set[int], *, received: bool) -> Trace:
    """Run a stage forward over a micro-batch.

    Args:
        stage: which one.
        problem: the stage as a `FlatLoss` whose value is its output, and what goes in.
        apart: leaves of which each example gets a copy; those that turn out to need it are added.
        received: whether the first leaf of the batch comes from the stage before, which wants the gradient there.

    Raises:
        LossError: it uses a tensor that requires a gradient and is none of its parameters, or changes what it is given.
        StrategyError: its examples take different paths, or it cannot run on all at once.
    """
    given = (*problem.params, *problem.batch)
    versions = [leaf._version for leaf in given]
    while True:
        try:
            trace = Trace(
                problem.loss, problem.params, problem.batch, RULES, apart, problem.mask, (0,) if received else ()
            )
        except Split as split:
            raise StrategyError(
                f"Stage {stage} asks a tensor for its value ({split.question}), and examples give different answers, "
                "which a pipeline cannot follow: write it with torch.where"
            ) from None
        except PegradError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise StrategyError(
                f"Stage {stage} cannot run on all examples of a micro-batch at once. {reason(error)}. On one process "
                "clipped_grad(compose(stages), ...) can, by a loop"
            ) from error
        if versions != [leaf._version for leaf in given]:
            raise LossError(
                f"Stage {stage} changes its params or its input in place, so it is not a pure function: make a new "
                "tensor (a = a * b in place of a.mul_(b))"
            )
        opaque = trace.opaque() - apart
        if not opaque:
            return trace
        apart |= opaque


def check_output(stage: int, value: Any, *, last: bool) -> None:
    """Check what a stage returned for one example.

    Raises:
        LossError: it is not one floating-point tensor; or not a scalar, from the last stage.
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
    elif not value.is_floating_point() or (last and value.dim()):
        kind = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    else:
        return
    raise LossError(
        f"Stage {stage} returned {kind}: expected one floating-point tensor for the next stage or, from the last, the "
        "scalar loss of one example, and no aux"
    )


class StageModule(nn.Module):
    """The module that `torch.distributed.pipelining` drives. It has no parameters: gradients are pegrad's affair.

    Attributes:
        work: the stage at work in the call that is running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: StageWork | None = None
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """Run one micro-batch.

        Args:
            x: `(m, ...)`, from the stage before.
            number: `(1,)`, the number of the micro-batch.
        """
        return _Hidden.apply(self._anchor, x, self.work, int(number))


class _Hidden(torch.autograd.Function):
    """A stage, as autograd sees it. The anchor makes the first stage's output require a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, work: StageWork, number: int) -> Tensor:
        """Run the stage forward."""
        ctx.work, ctx.number = work, number
        return work.forward(number, x)

    @staticmethod
    def backward(ctx: Any, at: Tensor) -> tuple[None, Tensor | None, None, None]:
        """Run it backward."""
        return None, ctx.work.backward(ctx.number, at), None, None
