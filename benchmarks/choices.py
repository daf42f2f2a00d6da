"""Ghost clipping with other choices at a site than the cost model's: always one kind of kernel, or the published rule.

Where a site has no such kernel, the only one it has is taken.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pegrad.plan.candidates import Candidate, Shaped, candidates
from pegrad.rules.site import Shape
from pegrad.strategies import Ghost


class _Chosen(Ghost):
    """Ghost clipping that takes the cheapest kernel of one kind."""

    @abstractmethod
    def stacks(self, use: Shaped) -> bool:
        """Whether the norms come from stacked gradients, or else from Gram matrices."""

    def choose(self, uses: Sequence[Shaped]) -> Candidate:
        """See `Traced.choose`."""
        found = candidates(uses, self.timings)
        of_kind = [candidate for candidate in found if candidate.stacks == self.stacks(uses[0])]
        return min(of_kind or found, key=lambda candidate: candidate.norm_time)

    def choose_norm(self, uses: Sequence[Shaped]) -> Candidate:
        """See `Traced.choose_norm`."""
        return self.choose(uses)


@dataclass(frozen=True)
class GhostOnly(_Chosen):
    """Norms from Gram matrices, whatever they cost (Li et al. 2022)."""

    def stacks(self, use: Shaped) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class InstantiateOnly(_Chosen):
    """Norms from stacked gradients, dropped at once (Lee & Kifer 2021, FastGradClip)."""

    def stacks(self, use: Shaped) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class PublishedRule(_Chosen):
    """The one or the other by Bu, Mao & Xu 2022, Section 4: Gram matrices where 2 T² < D p."""

    def stacks(self, use: Shaped) -> bool:
        """By the rule."""
        return not prefers_ghost(use.site.source.shape, use.g)


def prefers_ghost(weight: Shape, g: Shape) -> bool:
    """Whether the published rule takes Gram matrices.

    Args:
        weight: shape of the parameter, `(p, ...)`, with D p numbers.
        g: shape of the gradient at the output: `(B, p, *positions)` for a convolution, `(B, *positions, p)` otherwise.
    """
    return 2 * positions(weight, g) ** 2 < prod(weight)


def positions(weight: Shape, g: Shape) -> int:
    """T: at how many places of one example a weight is used."""
    return prod(g[2:] if len(weight) > 2 else g[1:-1])
