"""Convolution: geometry, kernels, their cost, the vjp rule, and the rule for norms and sums."""

from pegrad.rules.conv.function import replacements
from pegrad.rules.conv.kernels import KERNELS
from pegrad.rules.conv.rule import RULES

__all__ = ["KERNELS", "RULES", "replacements"]
