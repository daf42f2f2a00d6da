"""Clipping, as a value: how each example's gradient is bounded, and what that makes of the sensitivity.

Where `clip_norm` is asked for, a number is one bound for all leaves together, `Flat`. In its place:

- all leaves together: `Automatic`, `Normalised`, and `Weighted`, by a function of one's own;
- group by group: `PerLeaf`, `PerLayer`, `ByLabel`, `ByPrefix`. Each takes as `weighting` how a group is clipped.

Anything with a `sensitivity` and a `grouping` is a clipping as well: see `Clipping`.
"""

from pegrad.clipping.base import Clipping, Grouping, grouping_of
from pegrad.clipping.flat import Automatic, Flat, Normalised, Weighted, as_clipping, clip_weights
from pegrad.clipping.groups import ByLabel, ByPrefix, PerLayer, PerLeaf
from pegrad.clipping.weights import Over, Unclipped, Weighting, Weights

__all__ = [
    "Automatic",
    "ByLabel",
    "ByPrefix",
    "Clipping",
    "Flat",
    "Grouping",
    "Normalised",
    "Over",
    "PerLayer",
    "PerLeaf",
    "Unclipped",
    "Weighted",
    "Weighting",
    "Weights",
    "as_clipping",
    "clip_weights",
    "grouping_of",
]
