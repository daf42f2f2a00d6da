"""One of the two that `versions.py` lets take turns: a commit's clipped gradient, on that commit's own workloads.

It imports nothing of `benchmarks` but the workloads, and those from where PYTHONPATH says.
"""

import sys
import time

import torch

from pegrad.per_example import clipped_grad
from workloads import SCALES


def serve(scale: str, name: str, strategy: str, device: str) -> None:
    """Take the clipped gradient once for every line that comes in, and answer with the seconds."""
    task = SCALES[scale][name].task(device)
    function = clipped_grad(task.loss, clip_norm=1.0, strategy=strategy)
    function(task.params, task.batch)
    for _ in sys.stdin:
        start = time.perf_counter()
        function(task.params, task.batch)
        if device != "cpu":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
