"""Private steps that many processes take together, over `torch.distributed`.

Import it by its own name: `import pegrad` does not load it. Noise is a function of one key, so every rank makes it for
itself: it is added once, is never sent, and does not depend on how many ranks there are.
"""

from pegrad.distributed.agreement import AgreementError
from pegrad.distributed.checkpoints import Restored, restore, save
from pegrad.distributed.data_parallel import DataParallel, data_parallel
from pegrad.distributed.pipelining import Pipelined, PipelinedStep, compose, pipeline, pipelined
from pegrad.distributed.sharding import gather, shard
from pegrad.distributed.shares import Share, load, split
from pegrad.distributed.sums import ExactSum, FastSum
from pegrad.distributed.whole import whole

__all__ = [
    "AgreementError",
    "DataParallel",
    "ExactSum",
    "FastSum",
    "Pipelined",
    "PipelinedStep",
    "Restored",
    "Share",
    "compose",
    "data_parallel",
    "gather",
    "load",
    "pipeline",
    "pipelined",
    "restore",
    "save",
    "shard",
    "split",
    "whole",
]
