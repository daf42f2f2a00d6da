"""Box and Muller's function, from integers to normals, and how many bits the numbers of each dtype are made of."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pegrad.errors import ArgumentError


class Precision(NamedTuple):
    """How numbers of one dtype are made."""

    compute: torch.dtype  # the arithmetic runs in this
    word: torch.dtype  # one word of keystream for each uniform and for each angle
    resolution: int  # uniforms are multiples of 2**-resolution


_SINGLE = Precision(torch.float32, torch.int32, 24)
_DOUBLE = Precision(torch.float64, torch.int64, 53)
PRECISION = {
    torch.float64: _DOUBLE,
    torch.float32: _SINGLE,
    torch.bfloat16: _SINGLE,
    torch.float16: _SINGLE,
}


def precision_of(dtype: torch.dtype) -> Precision:
    """Look up how numbers of a dtype are made.

    Raises:
        ArgumentError: the dtype is none of the four.
    """
    if dtype not in PRECISION:
        names = ", ".join(str(known) for known in PRECISION)
        raise ArgumentError(f"Expected dtype to be one of {names}, got dtype={dtype}.")
    return PRECISION[dtype]


def box_muller(radius_words: Tensor, angle_words: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Make two independent standard normals of two independent integers.

    Args:
        radius_words: int64, uniform over its 64 bits; or those in `precision.compute` already.
        angle_words: of `precision.word`, uniform over its bits, of the same shape.
        precision: of the result.

    Returns:
        r·cos θ and r·sin θ, of `precision.compute`. None is larger than sqrt(128·ln 2) = 9.419.

    Source:
        Box and Muller, "A note on the generation of random normal deviates", 1958.
    """
    # Signed words have the finest spacing around 0, where the tail of the normal lies.
    radius = _centred(radius_words, precision).abs().mul(2.0**-63).log().mul(-2).sqrt()
    angle = _centred(angle_words, precision).mul(_turn(precision))
    return radius * angle.cos(), radius * angle.sin()


def fill(out: Tensor, radius_words: Tensor, angle_words: Tensor, precision: Precision) -> None:
    """Fill a flat tensor with `box_muller`'s normals, bit for bit, in place, where new memory would cost much.

    Args:
        out: of `precision.compute`: r·cos θ in its first half, r·sin θ in its second.
        radius_words: see `box_muller`; half as many as `out` has numbers, rounded up.
        angle_words: see `box_muller`.
        precision: see `box_muller`.
    """
    radius = _centred(radius_words, precision).abs_().mul_(2.0**-63).log_().mul_(-2).sqrt_()
    angle = _centred(angle_words, precision).mul_(_turn(precision))
    cosines, sines = out[: len(radius)], out[len(radius) :]
    torch.cos(angle, out=cosines).mul_(radius)
    torch.sin(angle[: sines.numel()], out=sines).mul_(radius[: sines.numel()])


def uniform_of(words: Tensor, precision: Precision) -> Tensor:
    """Make uniforms k/2^r, k in {1, ..., 2^r}, of words of `precision.word`."""
    steps = (words & ((1 << precision.resolution) - 1)) + 1
    return steps.to(precision.compute) * 2.0**-precision.resolution


def _centred(words: Tensor, precision: Precision) -> Tensor:
    """Signed words as floats, moved by half a unit: symmetric around 0, and never 0."""
    if words.dtype == precision.compute:
        return words.add(0.5)  # not over the words
    return words.to(precision.compute).add_(0.5)


def _turn(precision: Precision) -> float:
    """A whole turn over the number of words."""
    return 2 * math.pi / 2 ** (8 * precision.word.itemsize)
