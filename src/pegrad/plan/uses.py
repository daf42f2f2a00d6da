"""Which uses the parameters have in one trace, and which of them meet in a leaf."""

from typing import NamedTuple

from torch import Tensor

from pegrad.tracing.lineage import Lineage, lineage
from pegrad.tracing.trace import Trace


class ParameterUses(NamedTuple):
    """Where the source of every use comes from, and how many uses each leaf has."""

    lineages: dict[int, Lineage]
    """By the `id` of the source."""
    counts: list[int]
    """Number of uses of each leaf."""

    @classmethod
    def of(cls, trace: Trace) -> "ParameterUses":
        """Follow every use in a trace back to the leaves."""
        leaves = {id(leaf): i for i, leaf in enumerate(trace.params)}
        sources = [site.source for tapped in trace.tapped for site in tapped.sites]
        sources += [copies.source for copies in trace.copies]
        lineages: dict[int, Lineage] = {}
        counts = [0] * len(leaves)
        for source in sources:
            if id(source) not in lineages:
                lineages[id(source)] = lineage(source, leaves)
            for leaf in lineages[id(source)].leaves:
                counts[leaf] += 1
        return cls(lineages, counts)

    def leaves(self, source: Tensor) -> frozenset[int]:
        """Return the leaves that a source was made of."""
        return self.lineages[id(source)].leaves

    def isometric(self, source: Tensor) -> bool:
        """Tell whether a gradient at the source has the norm of that which it makes at its one leaf."""
        return self.lineages[id(source)].isometric

    def alone(self, source: Tensor) -> bool:
        """Tell whether the norm of this use's gradient is that of its leaf's: its only use, and an isometry."""
        return self.isometric(source) and all(self.counts[leaf] == 1 for leaf in self.leaves(source))
