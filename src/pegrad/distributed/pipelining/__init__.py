"""Models that are cut into stages, one or several to a process: their clipped gradients, and the private step."""

from pegrad.distributed.pipelining.clipped import Pipelined, compose, pipeline
from pegrad.distributed.pipelining.layout import SCHEDULES
from pegrad.distributed.pipelining.step import PipelinedStep, pipelined

__all__ = ["SCHEDULES", "Pipelined", "PipelinedStep", "compose", "pipeline", "pipelined"]
