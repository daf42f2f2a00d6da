"""Convolution: geometry, the per-example weight gradient's kernels, their cost, and the vjp rule."""

from pegrad.rules.conv.calls import replacements
from pegrad.rules.conv.kernels import KERNELS

__all__ = ["KERNELS", "replacements"]
