"""Several uses of one parameter, taken together: uses of one kind as one use, and what uses of two kinds share."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.rules.site import Shape, Site


class Part(NamedTuple):
    """One use, or several of one kind, with what it takes to find its gradients."""

    site: Site
    x: Tensor
    g: Tensor
    flipped: bool = False
    """Whether the gradient at the site's source is the transpose of that which is looked for."""

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Shapes of `x` and `g`."""
        return tuple(self.x.shape), tuple(self.g.shape)

    @property
    def numbers(self) -> int:
        """How many numbers input and gradient have."""
        return self.x.numel() + self.g.numel()

    @property
    def positions(self) -> int:
        """How many terms an example's gradient is the sum of."""
        return self.site.positions(*self.shapes)

    def straight(self, stacked: Tensor) -> Tensor:
        """Turn a stacked gradient at the site's source into one at the parameter that all parts share."""
        return stacked.mT if self.flipped else stacked

    def rows(self, start: int, stop: int, batch: int) -> "Part":
        """Take some examples."""
        if start == 0 and stop >= batch:
            return self
        several = self.g.shape[0] // batch
        part = slice(start * several, stop * several)
        return self._replace(x=self.x[part], g=self.g[part])


def join(parts: Sequence[Part], source: Tensor, batch: int) -> list[Part]:
    """Take the uses of one kind for one: their positions are positions of one use.

    Args:
        parts: uses of one parameter.
        source: the parameter, as a use that is not flipped has it.
        batch: B.
    """
    straight = [_straightened(part, source) for part in parts]
    return [_joined([straight[i] for i in alike], batch) for alike in kinds(parts, source)]


def kinds(parts: Sequence[Part], source: Tensor) -> list[list[int]]:
    """Sort uses of one parameter by kind: the indices of those that `join` takes for one."""
    found: dict[object, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        part = _straightened(part, source)
        kind = part.site.kind(*part.shapes)
        found[i if kind is None else (part.flipped, kind)].append(i)
    return list(found.values())


def _joined(alike: Sequence[Part], batch: int) -> Part:
    first = alike[0]
    if len(alike) == 1:
        return first
    site, x, g = first.site.joined([(part.x, part.g) for part in alike], batch)
    return Part(site, x, g, first.flipped)


def _straightened(part: Part, source: Tensor) -> Part:
    turned = part.site.turned(source, part.x, part.g) if part.flipped else None
    return part if turned is None else Part(*turned)


class Outer(NamedTuple):
    """Gradients `(B, p, D)` that are sums over positions of `left[t] ⊗ right[t]`.

    A factor is `(B, T, p)` or `(B, T, D)`; or of integers `(B, T)`, which stand for unit vectors.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, part: Part) -> "Outer | None":
        """Return the factors of a part's gradients, if its site knows them."""
        factors = part.site.factors(part.x, part.g)
        if factors is None:
            return None
        return cls(*factors[::-1]) if part.flipped else cls(*factors)


def inner(a: Outer, b: Outer) -> Tensor:
    """Inner products of two gradients, example by example: `(B,)`."""
    return (_products(a.left, b.left) * _products(a.right, b.right)).flatten(1).sum(1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the vectors at all positions: `(B, T, S)`."""
    if a.is_floating_point() and b.is_floating_point():
        return a @ b.mT
    if a.is_floating_point():
        return a.gather(2, b[:, None].expand(-1, a.shape[1], -1))
    if b.is_floating_point():
        return _products(b, a).mT
    return (a[:, :, None] == b[:, None]).to(torch.float32)
