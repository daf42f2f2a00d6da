"""One plan a call: which uses' gradients are found together, and how."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pegrad.numerics import accumulator
from pegrad.plan.candidates import Candidate, Shaped
from pegrad.plan.parts import Outer, Part, join, kinds
from pegrad.plan.places import Place, boxes, flips
from pegrad.plan.uses import ParameterUses
from pegrad.rules.site import Site
from pegrad.tracing.taps import Tapped
from pegrad.tracing.trace import Copies, Trace

Choose = Callable[[Sequence[Shaped]], Candidate]
"""Picks the way to the norms and the sum of one parameter's gradients, from its uses."""

Way = Literal["joint", "made", "stacked"]
"""How the gradients of some uses are found.

`joint`: by kernels, at one source, a part of a leaf of which no other use has a number. `made`: at one source as
well, which was made of leaves by more than an isometry, and is all that was made of them. `stacked`: the gradients of
all uses are stacked, and added up at the leaves.
"""


@dataclass(eq=False)
class Group:
    """Uses whose gradients are added up before they are measured, and how that is done.

    Args:
        way: how.
        sites: the uses by operations that have a rule, with the operations.
        copies: the uses by others.
        flipped: for each site, by `id`, whether its source is the transpose of `source`.
        choice: for `joint` uses by operations that have a rule, the kernels.
    """

    way: Way
    sites: list[tuple[Site, Tapped]] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    flipped: dict[int, bool] = field(default_factory=dict)
    choice: Candidate | None = None

    @property
    def source(self) -> Tensor:
        """Where the gradients are added up, if it is not at the leaves."""
        return self.sites[0][0].source if self.sites else self.copies[0].source

    @property
    def sources(self) -> list[Tensor]:
        """The source of every use."""
        return [site.source for site, _ in self.sites] + [copies.source for copies in self.copies]

    def joined(self, entered: Sequence[tuple[Site, Tensor, Tensor]], batch: int) -> list[Part]:
        """Take the uses of one kind for one.

        Args:
            entered: sites of this group, each with its input and the gradient at its output.
            batch: B.
        """
        parts = [Part(site, x, g, self.flipped.get(id(site), False)) for site, x, g in entered]
        return parts if len(parts) == 1 and not parts[0].flipped else join(parts, self.source, batch)

    def shaped(self, batch: int) -> list[Shaped]:
        """Take the uses of one kind for one, before there is anything but shapes."""
        if len(self.sites) == 1:
            site, tapped = self.sites[0]
            return [Shaped(site, tapped.x, tapped.y, tapped.dtype)]
        return shaped(self.joined(self._on_meta(), batch))

    def kind_of(self, use: Site) -> int:
        """Return the place among `shaped` of the kind that a use is of."""
        if len(self.sites) == 1:
            return 0
        parts = [Part(site, x, g, self.flipped.get(id(site), False)) for site, x, g in self._on_meta()]
        at = next(i for i, (site, _) in enumerate(self.sites) if site is use)
        return next(i for i, alike in enumerate(kinds(parts, self.source)) if at in alike)

    def _on_meta(self) -> list[tuple[Site, Tensor, Tensor]]:
        with torch.device("meta"):
            return [(site, torch.empty(t.x, dtype=t.dtype), torch.empty(t.y)) for site, t in self.sites]


def shaped(parts: Sequence[Part]) -> list[Shaped]:
    """Forget all of some parts but their shapes."""
    several = len(parts) > 1
    return [Shaped(p.site, *p.shapes, p.x.dtype, several and Outer.of(p) is not None) for p in parts]


class Plan:
    """How each leaf's norms and sum are found, decided from shapes, before the backward pass.

    Args:
        trace: the trace that will be run backward.
        choose: picks kernels.
        rows: how many rows will be summed in all: see `Problem.sum_rows`.
        apart: for each leaf the clipping group that it is in; None: all are in one.

    Attributes:
        uses: where each use comes from.
        groups: all groups.
        of: for each source, by `id`, its group.
        stacked: how many uses of each leaf are stacked.
    """

    def __init__(self, trace: Trace, choose: Choose, rows: int = 1, apart: Sequence[int] | None = None) -> None:
        self.uses = ParameterUses.of(trace)
        self._apart = apart
        self.of: dict[int, Group] = {}
        places = _places(trace, self.uses)
        members: dict[Any, Group] = defaultdict(lambda: Group("stacked"))
        for tapped in trace.tapped:
            for site in tapped.sites:
                members[_key(places, site.source)].sites.append((site, tapped))
        for copies in trace.copies:
            members[_key(places, copies.source)].copies.append(copies)
        self.groups = list(members.values())
        self.stacked = [0] * len(trace.params)
        batch = trace.losses.shape[0]
        for group in self.groups:
            self._settle(group, places, rows)
            if group.way == "joint" and group.sites:
                group.choice = choose(group.shaped(batch))

    def leaf(self, source: Tensor) -> int:
        """Return a leaf that a source was made of."""
        return next(iter(self.uses.leaves(source)))

    def _settle(self, group: Group, places: Mapping[int, tuple[int, Place]], rows: int) -> None:
        """Decide how a group's gradients are found."""
        sources = group.sources
        for source in sources:
            self.of[id(source)] = group
        there = [places[id(source)][1] for source in sources if id(source) in places]
        turned = flips(sources, there) if there else None
        if turned and (not group.copies or len(turned) == 1):
            group.way = "joint"
            group.flipped = {id(site): flip for (site, _), flip in zip(group.sites, turned, strict=False)}
        elif self._is_made(group, rows):
            group.way = "made"
        else:
            for source in sources:
                for leaf in self.uses.leaves(source):
                    self.stacked[leaf] += 1

    def _is_made(self, group: Group, rows: int) -> bool:
        """Tell whether a sum at the source reaches the leaves with all its digits, and nothing else does."""
        line, source = self.uses.lineages[id(group.source)], group.source
        sole = all(self.uses.counts[leaf] == len(group.sources) for leaf in line.leaves)
        sole &= all(other is source for other in group.sources)  # other views of the same numbers lay them otherwise
        exact = not line.cast and source.dtype == accumulator(source.dtype, rows)
        kinds = {site.kind(tapped.x, tapped.y) for site, tapped in group.sites}
        one = len(group.sites) == 1 or (len(kinds) == 1 and None not in kinds)
        bounded = all(site.bounded for site, _ in group.sites)
        together = self._apart is None or len({self._apart[leaf] for leaf in line.leaves}) == 1
        return sole and exact and one and bounded and together and not group.copies


def _places(trace: Trace, uses: ParameterUses) -> dict[int, tuple[int, Place]]:
    """Find, for each source that is a part of one leaf, by `id`, the leaf and the part."""
    sources: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for source in [site.source for tapped in trace.tapped for site in tapped.sites] + [c.source for c in trace.copies]:
        for leaf in uses.leaves(source):
            sources[leaf][id(source)] = source
    found = {}
    for leaf, made in sources.items():
        if all(uses.isometric(source) for source in made.values()):
            for key, there in (boxes(made, trace.params[leaf]) or {}).items():
                found[key] = leaf, there
    return found


def _key(places: dict[int, tuple[int, Place]], source: Tensor) -> Any:
    """Name the numbers that a gradient at a source is one of: a box of a leaf, or the source itself."""
    if id(source) not in places:
        return id(source)
    leaf, there = places[id(source)]
    return leaf, there.box
