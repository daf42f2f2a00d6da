"""Recurrent networks and their cells: calls, steps, whole sweeps by hand, and the rule for norms and sums."""

from pegrad.rules.recurrent.rule import RULES
from pegrad.rules.recurrent.steps import BY_STEPS, PACKED_BY_STEPS

__all__ = ["BY_STEPS", "PACKED_BY_STEPS", "RULES"]
