"""What a strategy makes of a use, beside what the plain loop makes of it."""

from enum import Enum
from typing import Any

import optree
import torch
from torch import Tensor

import oracle
import pegrad
from tables.uses import Use

RELATIVE = 1e-7


class Kind(Enum):
    """The outcomes."""

    RIGHT = "right"
    TYPED = "typed error"
    RAW = "raw error"
    WRONG = "WRONG"
    INAPPLICABLE = "not applicable"


class Inapplicable(Exception):
    """The plain loop cannot differentiate a use."""


class Truth:
    """The plain loop's gradients of one use.

    Raises:
        Inapplicable: the loop fails, or none of its rows is finite.
    """

    def __init__(self, use: Use) -> None:
        self.use = use
        try:
            before = torch.get_rng_state()
            self.grads = oracle.per_example_grads(use.loss, use.params, use.batch)
        except Exception as error:
            raise Inapplicable(f"{type(error).__name__}: {error}") from error
        self.random = not torch.equal(before, torch.get_rng_state())
        self.norms = oracle.norms(self.grads)
        self.finite = torch.isfinite(self.norms)
        if not self.finite.any():
            raise Inapplicable("no row is finite")
        self.clip_norm = min(max(self.norms[self.finite].median().item(), 1e-3), 1e8)  # within what is accepted

    def judge(self, strategy: str) -> tuple[Kind, str]:
        """Compare stacked gradients, norms and clipped sum under a strategy; of random uses, the shapes only."""
        use = self.use
        try:
            grads = pegrad.per_example_grad(use.loss, strategy=strategy)(use.params, use.batch)
            norms = pegrad.per_example_norm(use.loss, strategy=strategy)(use.params, use.batch)
            out = pegrad.clipped_grad(use.loss, clip_norm=self.clip_norm, strategy=strategy)(use.params, use.batch)
        except pegrad.PegradError as error:
            return Kind.TYPED, f"{type(error).__name__}: {error}"
        except Exception as error:
            return Kind.RAW, f"{type(error).__name__}: {error}"
        if [g.shape for g in _leaves(grads)] != [g.shape for g in self.grads]:
            return Kind.WRONG, "shapes of the gradients"
        fault = "" if self.random else self._fault(_leaves(grads), norms, out)
        return (Kind.WRONG, fault) if fault else (Kind.RIGHT, "")

    def _fault(self, grads: list[Tensor], norms: Tensor, out: pegrad.Clipped) -> str:
        finite = self.finite
        if any(not torch.equal(torch.isfinite(a), torch.isfinite(b)) for a, b in zip(grads, self.grads, strict=True)):
            return "finite in one, not in the other"
        expected = [g[finite] for g in self.grads]
        largest = max([1e-6, *(g.abs().max().item() for g in expected if g.numel())])
        for name, got, want in (
            ("gradients", [g[finite] for g in grads], expected),
            ("norms", [norms[finite], out.norms[finite]], [self.norms[finite]] * 2),
            ("clipped sum", _leaves(out.grads), oracle.clipped_sum(expected, self.clip_norm)),
        ):
            for a, b in zip(got, want, strict=True):
                error = (a - b).abs().max().item() if b.numel() else 0.0
                if not error <= RELATIVE * largest:
                    return f"{name}: off by {error / largest:.2g} of the largest entry"
        return ""


def _leaves(tree: Any) -> list[Tensor]:
    return optree.tree_leaves(tree, namespace="pegrad")
