"""The plain loop: `torch.autograd.grad`, one example after another, which `pegrad.check` compares strategies with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pegrad import trees

Leaves = list[Tensor]


@dataclass(frozen=True)
class Loop:
    """What the loop gives, in float64 whatever it was computed in."""

    losses: Tensor
    """`(B,)`"""
    grads: Leaves
    """For each parameter leaf `(B, *leaf.shape)`; zero where the loss does not depend on it."""
    used: list[bool]
    """For each parameter leaf, whether the loss of any example depends on it."""
    finite: Tensor
    """`(B,)`, boolean: whether the squared norm is finite, in the precision in which norms are taken."""
    narrowest: torch.dtype
    """The least precise dtype that the loss computes in."""
    strangers: int
    """How many tensors beside the parameters the loss depends on that require a gradient."""
    changed: list[int]
    """Which of the leaves, parameters before the batch's, the loss changed in place."""

    @property
    def norms(self) -> Tensor:
        """Norm of each example's gradient over all leaves, `(B,)`."""
        return whole_norms(self.grads)

    def equals(self, other: "Loop") -> bool:
        """Tell whether two runs gave the same: bit for bit, or on an accelerator, which may add in any order, nearly.

        Args:
            other: a run on the same arguments.
        """
        mine, theirs = (self.losses, *self.grads), (other.losses, *other.grads)
        slack = 0.0 if self.losses.device.type == "cpu" else 64 * torch.finfo(self.narrowest).eps

        def near(a: Tensor, b: Tensor) -> bool:
            scale = torch.nan_to_num(a, 0, 0, 0).abs().max() if a.numel() else 0.0
            return torch.allclose(a, b, rtol=slack, atol=float(slack * scale), equal_nan=True)

        return all(map(near, mine, theirs))


def run(loss: Callable[[Leaves, Leaves], tuple[Tensor, Any]], params: Leaves, batch: Leaves, seed: int) -> Loop:
    """Run the loop.

    Args:
        loss: `(parameter leaves, leaves of one example) -> (scalar, aux)`.
        params: the parameter leaves.
        batch: the batch's leaves, each `(B, ...)`, B >= 1.
        seed: torch's generators start from `seed + b` for example b. They are left as they were.
    """
    leaves = [leaf.detach().clone().requires_grad_() for leaf in params]
    losses, rows = [], []
    used = [False] * len(leaves)
    changed: set[int] = set()
    strangers: set[int] = set()
    watch = _Narrowest()
    for b in range(batch[0].shape[0]):
        example = [leaf[b].clone() for leaf in batch]
        with seeded(seed + b, leaves[0].device), torch.enable_grad():
            with watch:
                value, _ = loss(leaves, example)
            grads: Any = [None] * len(leaves)
            if value.requires_grad:
                strangers |= _sources(value) - {id(leaf) for leaf in leaves}
                grads = torch.autograd.grad(value, leaves, allow_unused=True)
        pairs = zip([*params, *(leaf[b] for leaf in batch)], [*leaves, *example], strict=True)
        changed |= {i for i, (old, new) in enumerate(pairs) if _differ(old, new)}
        used = [was or grad is not None for was, grad in zip(used, grads, strict=True)]
        losses.append(value.detach())
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)])
    stacked = [torch.stack(column).detach() for column in zip(*rows, strict=True)]
    norms = whole_norms([grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in stacked])
    narrowest = min(watch.seen | {leaf.dtype for leaf in params}, key=lambda dtype: -torch.finfo(dtype).eps)
    wide = [g.double() for g in stacked]
    return Loop(torch.stack(losses).double(), wide, used, norms.isfinite(), narrowest, len(strangers), sorted(changed))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with torch's generators, the CPU's and the device's, started from a seed, and put them back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def whole_norms(grads: Leaves) -> Tensor:
    """Norms over all leaves of stacked gradients `(B, ...)`: `(B,)`."""
    return torch.stack([row_norms(grad) for grad in grads]).square().sum(0).sqrt()


def row_norms(t: Tensor) -> Tensor:
    """Norms of the rows of a tensor `(B, ...)`: `(B,)`."""
    return t[:, None].flatten(1).square().sum(1).sqrt()


class _Narrowest(TorchFunctionMode):
    """Notes the floating-point dtypes of what is computed from floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(_is_floating(t) for t in trees.leaves((args, kwargs))):
            self.seen |= {t.dtype for t in trees.leaves(result) if _is_floating(t)}
        return result


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _sources(value: Tensor) -> set[int]:
    """Find the tensors that a value's graph ends in, by `id`."""
    found: set[int] = set()
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [parent for parent, _ in node.next_functions]
    return found | ({id(value)} if value.grad_fn is None else set())


def _differ(before: Tensor, after: Tensor) -> bool:
    a, b = before.detach(), after.detach()
    return not bool(((a == b) | (a != a) & (b != b)).all())
