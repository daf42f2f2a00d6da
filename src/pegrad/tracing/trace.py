"""One run of a loss over a batch, in which every use of a parameter is a site.

The loss runs once, under `vmap`. Where an operation that has a rule meets a parameter, the rule runs the native
operation on the physical batch and taps its output: in the backward pass the tap receives the loss's gradient at that
output, from which the rule knows everything else, and the parameter itself is no part of the graph. (An operation that
works out its gradients in a backward of its own announces its sites instead, and sends to them from there.) What the
loss makes of parameters alone stays unbatched, and is a parameter in turn. Where a parameter meets an operation without
a rule, each example gets a copy of it for that use; what autograd returns for the copies is the stacked gradient.

Every run is traced anew, so a loss may take another path each time. What could make the numbers wrong in silence is
refused: a parameter, or what was made of one, changed in place after its use; a hook on a gradient, of which the rules
know nothing; losses that no tap and no copy has any part in. Functions of PyTorch's that are written in Python are seen
through (`inlining`), and so is a `vmap` of the loss's own (`nested`). Where the trace cannot follow (into another
transform of torch.func inside the loss, or through a user's `autograd.Function` between a parameter and its use) it
steps aside: the leaf then shows up in the backward pass, or is marked, and each example gets a copy of it in a second
run. A loss that calls `torch.autograd.grad` needs a graph that holds every parameter: each example gets a copy of all.

What a batch cannot answer or do as one has files of its own: `questions` (`if x.mean() > 0`), `rows` (`x[mask]`) and
`writes` (`out[t] = h`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from pegrad import trees
from pegrad.errors import LossError, PegradError, StrategyError
from pegrad.rules.recurrent import BY_STEPS
from pegrad.rules.site import Rule, Shape, Site
from pegrad.torch_internals import differentiated, is_batched, is_tracked, is_view, level, lowered, unsafe_view
from pegrad.tracing.batched import on_physical_batch, physical
from pegrad.tracing.foreign import of_checkpoint, refuse_checkpoint
from pegrad.tracing.inlining import inlined
from pegrad.tracing.inner_grad import SET_REQUIRES_GRAD, Differentiates, inner_grad, require_grad
from pegrad.tracing.interception import Intercepted
from pegrad.tracing.journal import Journal, kept, once
from pegrad.tracing.lineage import lineage
from pegrad.tracing.loss import independent
from pegrad.tracing.nested import WIDENED, on_all_images
from pegrad.tracing.questions import INDEXED, QUESTIONS, Inquiry
from pegrad.tracing.rows import Aliases, can_separate, row_by_row
from pegrad.tracing.sound import SOUND
from pegrad.tracing.taps import Line, Receive, Sender, Tap, Tapped
from pegrad.tracing.writes import Made, writes

_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
_SHAPES = {
    *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
}
"""Functions that read nothing of a tensor but what all examples share; models call them more than any other."""

_NODES = (list, tuple, Mapping)  # what may hold tensors
_FLAT = (bool, int, float, str, type(None), torch.dtype, torch.device)  # not to ask an abstract class about each

T = TypeVar("T")

Loss = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
"""`(parameter leaves, example leaves) -> (scalar, aux leaves)`"""


@dataclass(frozen=True, eq=False)
class Copies:
    """A parameter of which each example has a copy, for operations that have no rule."""

    source: Tensor
    rows: Tensor  # (B, *source.shape), a leaf of the graph
    operation: str  # the first that met it


class Trace(Intercepted):
    """Run a loss over a batch and note the sites of its parameters.

    Args:
        loss: `(parameter leaves, example leaves) -> (scalar, aux leaves)`.
        params: the parameter leaves.
        batch: the batch's leaves, each `(B, ...)`, B >= 1.
        rules: for each function that has one, its rule.
        apart: indices of the leaves of which each example gets a copy from the start, whatever their uses.
        mask: `(B,)`, boolean; False marks rows whose path through the loss does not matter. None: all rows' does.
        through: indices of the batch's leaves that the backward pass goes on to, for the gradients there.

    Raises:
        Split: the examples take different paths.

    Attributes:
        params: the leaves that the loss was given: the parameters, cut off from any graph of the caller's.
        losses: `(B,)`, with the graph down to taps and copies.
        aux: the leaves of aux, each `(B, ...)`, detached.
        inputs: the leaves in `through`, as the loss was given them.
        input_grads: after a backward pass, the gradients there; zeros where the loss does not depend on one.
        tapped: the operations that met parameters, in the order in which they ran.
        copies: the parameters of which each example has a copy.
        journals: of the functions that are running and will run again in the backward pass.
    """

    def __init__(
        self,
        loss: Loss,
        params: Sequence[Tensor],
        batch: Sequence[Tensor],
        rules: Mapping[Callable, Rule],
        apart: Collection[int] = (),
        mask: Tensor | None = None,
        through: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.params = [leaf.detach().requires_grad_() for leaf in params]
        self.tapped: list[Tapped] = []
        self.copies: list[Copies] = []
        self.journals: list[Journal] = []
        self.inputs: list[Tensor] = []
        self.input_grads: list[Tensor] = []
        self._rules = rules
        self._leaves = {id(leaf): i for i, leaf in enumerate(self.params)}
        self._made: dict[Any, bool] = {}
        self._copied: dict[int, Tensor] = {}
        self._versions: list[tuple[Tensor, int, str]] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._line = Line()
        self._mask = mask
        self._through = through
        self._whole = len(apart) == len(self.params)
        try:
            self._run(loss, batch, apart)
        except Differentiates:
            self._whole = True
            for noted in (self.tapped, self.copies, self._versions, self._copied, self.journals):
                noted.clear()
            self._run(loss, batch, range(len(self.params)))
        self._check_versions()

    def _run(self, loss: Loss, batch: Sequence[Tensor], apart: Collection[int]) -> None:
        def traced(*leaves: Tensor) -> tuple[Tensor, ...]:  # plain tuples, for `vmap` looks into everything else
            self._level, self._example = level() or 0, leaves[0]
            example, copies = leaves[: len(batch)], dict(zip(apart, leaves[len(batch) :], strict=True))
            with self:
                value, aux = loss([copies.get(i, leaf) for i, leaf in enumerate(self.params)], list(example))
            return value, *aux

        with torch.enable_grad():
            copies = [self._copy(self.params[i], batch[0].shape[0], "(all)") for i in apart]
            rows = [leaf.detach().requires_grad_(i in self._through) for i, leaf in enumerate(batch)]
            self.inputs = [rows[i] for i in self._through]
            self._inquiry, self._aliases, self._here = Inquiry(self._mask, len(rows[0])), Aliases(), Made()
            try:
                self.losses, *aux = vmap(traced, randomness="different")(*rows, *copies)
            except Exception:
                self._inquiry.check()
                raise
        self._inquiry.check()
        self._aliases.check()
        self._aliases, self._here = Aliases(), Made()
        self.aux = [leaf.detach() for leaf in aux]

    def backward(
        self, receive: Receive, *, last: bool = True, at: Tensor | None = None
    ) -> tuple[list[Tensor], list[bool]]:
        """Run the backward pass from every loss, down to taps, copies and the inputs that were asked for.

        Args:
            receive: called for every tapped operation that the loss depends on.
            last: whether the graph may be freed.
            at: the gradients at the losses, of their shape. None: ones.

        Returns:
            For each of `copies`, the stacked gradient `(B, *source.shape)`; for each of `params`, whether the loss
            depends on it past all taps and copies, in which case what was received is not the whole gradient.

        Raises:
            LossError: the losses depend on no parameter at all.
        """
        if not self.losses.requires_grad:
            raise independent()
        rows = [c.rows for c in self.copies]
        inputs = [*rows, *self.params, self._anchor, *self.inputs]
        with self._line.open(receive):
            at = torch.ones_like(self.losses) if at is None else at
            grads = torch.autograd.grad(self.losses, inputs, at, retain_graph=not last, allow_unused=True)
        grads, at_inputs = grads[: len(inputs) - len(self.inputs)], grads[len(inputs) - len(self.inputs) :]
        if not self._line.sent and all(grad is None for grad in grads):
            raise independent()
        self.input_grads = _or_zeros(self.inputs, at_inputs)
        return _or_zeros(rows, grads[: len(rows)]), [g is not None for g in grads[len(rows) : -1]]

    def call(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Intercepted.call`."""
        if func in _SHAPES:
            return func(*args, **kwargs)
        refuse_checkpoint()
        nested = level() != self._level
        if nested:  # where the rule of a recurrence does not reach
            func = BY_STEPS.get(func, func)
        if nested and differentiated():  # inside a transform of the loss's own, other than a `vmap`
            return func(*args, **kwargs)
        if func == _REQUIRES_GRAD and is_batched(args[0]):  # the wrapper says no; its rows know
            return physical(args[0]).requires_grad
        if func in INDEXED and not nested:
            args = (args[0], self._inquiry.index(args[1]), *args[2:])
        tensors = _tensors(args, kwargs)
        parameters = [t for t in tensors if self.is_parameter(t)]
        witness = next((t for t in tensors if is_batched(t)), None)
        name = getattr(func, "__name__", None) or str(func)
        if witness is not None:
            if func in QUESTIONS and not nested:
                return self._inquiry.ask(func, args, kwargs)
            func = SOUND.get(func, func)
        if func in SET_REQUIRES_GRAD and is_batched(args[0]):
            return require_grad(*args, **kwargs)
        if witness is not None and kwargs.get("requires_grad"):  # zeros_like(..., requires_grad=True) and its like
            return require_grad(func(*args, **{**kwargs, "requires_grad": False}))
        if func is torch.autograd.grad and (parameters or witness is not None) and not any(map(is_tracked, tensors)):
            if not self._whole:
                raise Differentiates
            return inner_grad(*args, **kwargs)
        if func in _HOOKS and (parameters or witness is not None):
            raise StrategyError(
                f"The loss calls {name}, which may change gradients on their way back: use strategy='vmap' or 'naive'"
            )
        rule = self._rules.get(func)
        if rule is not None and witness is not None:
            result = self._nested(func, args, kwargs) if nested else rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        body = inlined(func) if witness is not None and (parameters or _takes_function(args, kwargs)) else None
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if witness is None and parameters and self.journals:
            with kept():
                return func(*args, **kwargs)
        if witness is None:
            result = func(*args, **kwargs)
            if not nested:
                self._here.note(result, func, tensors)
            return result
        if writes(name):
            self._admit(args[0] if args else None, witness, name, nested)
            parameters = [t for t in parameters if self.is_parameter(t)]
        copied = {id(p): self.expand(p, witness, name) for p in parameters}

        def replace(argument: Any) -> Any:
            return copied.get(id(argument), argument)

        if copied:
            args, kwargs = trees.map(replace, args), trees.map(replace, kwargs)
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if nested or writes(name) or isinstance(error, PegradError) or not can_separate(func, kwargs):
                raise
            if of_checkpoint(error):
                raise
            try:
                return row_by_row(self._inquiry, self._aliases, func, args, kwargs)
            except Exception:
                raise error from None

    def _admit(self, target: Any, witness: Tensor, name: str, nested: bool) -> None:
        """Let a tensor that is the same for all examples hold what differs, before that is written to it."""
        if not isinstance(target, Tensor) or is_batched(target):
            return
        made = self.is_parameter(target)
        memory = target.untyped_storage().data_ptr()
        if any(memory == leaf.untyped_storage().data_ptr() for leaf in self.params):
            raise LossError(
                f"The loss changes a leaf of params in place ({name}), so it is not a pure function: make a new tensor "
                "(a = a * b in place of a.mul_(b))"
            )
        if nested and not made:  # PyTorch tells by itself
            return
        if not nested and target in self._here and all(target is not source for source, _, _ in self._versions):
            if made:
                batched = self.expand(target.clone(), witness, name).clone()
            else:
                batched = self.run(lambda like: target.expand(len(like), *target.shape).clone(), witness)
            if self._here.replace(target, batched):
                return
        raise StrategyError(
            f"The loss writes in place to a {'tensor made of params alone' if made else 'shared tensor'} what differs "
            f"from example to example ({name}): build a new tensor instead (torch.stack, torch.where, a + b), or use "
            "strategy='naive'. Unless the loss has made that tensor, it is not a pure function"
        )

    def _nested(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        widened = WIDENED.get(func)
        return NotImplemented if widened is None else on_all_images(widened, self, args, kwargs)

    def is_parameter(self, tensor: Any) -> bool:
        """See `Recorder.is_parameter`."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or is_batched(tensor):
            return False
        return id(tensor) in self._leaves if tensor.grad_fn is None else self._is_made(tensor)

    def _is_made(self, tensor: Tensor) -> bool:
        """Tell whether any parameter went into a tensor; what the loss closes over may have a graph of its own."""
        node = tensor.grad_fn
        if node not in self._made:
            self._made[node] = bool(lineage(tensor, self._leaves).leaves)
        return self._made[node]

    def opaque(self) -> set[int]:
        """Return the leaves with a user's `autograd.Function` on their way to a use.

        Its backward need not be linear, so the gradient of a sum need not be the sum of gradients.
        """
        sources = [site.source for tapped in self.tapped for site in tapped.sites] + [c.source for c in self.copies]
        lines = [lineage(source, self._leaves) for source in sources if source.grad_fn is not None]
        return {leaf for line in lines if not line.linear for leaf in line.leaves}

    def _note(self, source: Tensor, operation: str) -> None:
        if id(source) not in self._leaves:  # the leaves themselves are checked under every strategy, by `Call`
            self._versions.append((source, source._version, operation))

    def _check_versions(self) -> None:
        for source, version, operation in self._versions:
            if source._version != version:
                raise StrategyError(
                    f"The loss changes in place a tensor made of params, after {operation} used it: make a new tensor "
                    "(a = a * b in place of a.mul_(b)), or use strategy='naive'"
                )

    def is_batched(self, tensor: Any) -> bool:
        """See `Recorder.is_batched`."""
        return isinstance(tensor, Tensor) and is_batched(tensor)

    def record(self, run: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `Recorder.record`."""
        return on_physical_batch(lambda x: run(x, self._tap), x)

    def run(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """See `Recorder.run`."""
        return on_physical_batch(function, *tensors)

    def expand(self, parameter: Tensor, witness: Tensor, operation: str = "") -> Tensor:
        """See `Recorder.expand`."""

        def copy() -> Tensor:
            if id(parameter) not in self._copied:  # `copies` keeps the parameter alive, so its id stays its own
                with lowered(self._level):
                    self._copied[id(parameter)] = on_physical_batch(
                        lambda like: self._copy(parameter, like.shape[0], operation), self._example
                    )
            return self._copied[id(parameter)]

        return self._once([(parameter, operation)], copy)

    def _once(self, uses: Iterable[tuple[Tensor, str]], make: Callable[[], T]) -> T:
        if not self.journals:
            return make()
        known = [(lineage(source, self._leaves).leaves, source.shape, operation) for source, operation in uses]
        return once(self.journals, known, make)

    def _copy(self, parameter: Tensor, batch: int, operation: str) -> Tensor:
        self._note(parameter, operation)
        rows = parameter.detach().expand(batch, *parameter.shape).requires_grad_()
        self.copies.append(Copies(parameter, rows, operation))
        return rows

    def announce(self, sites: list[Site], x: Shape, y: Shape, dtype: torch.dtype) -> Sender:
        """See `Recorder.announce`."""

        def note() -> Sender:
            for site in sites:
                self._note(site.source, site.operation)
            self.tapped.append(Tapped(sites, tuple(x), tuple(y), dtype))
            return Sender(self._anchor, self._line, self.tapped[-1])

        return self._once(((site.source, site.operation) for site in sites), note)

    def _tap(self, y: Tensor, x: Tensor, sites: list[Site]) -> Tensor:
        if not sites:
            return y
        if is_view(y):  # a tapped view would make every later in-place operation copy its gradient
            y = unsafe_view(y, y.shape)
        send = self.announce(sites, x.shape, y.shape, x.dtype)
        return Tap.on(y, x.detach(), send)


def _or_zeros(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)]


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor):
            found.append(argument)
        elif not isinstance(argument, _FLAT) and isinstance(argument, _NODES):
            found += [leaf for leaf in trees.leaves(argument) if isinstance(leaf, Tensor)]
    return found


def _takes_function(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(callable(argument) and not isinstance(argument, Tensor) for argument in (*args, *kwargs.values()))
