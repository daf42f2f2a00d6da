"""Train the MNIST network on handwritten digits in two stages, one a process, each clipped where it lives.

    torchrun --nproc-per-node 2 examples/pipeline_mnist.py

The convolutions are one stage and the linear layers the other. Activations go forward and the gradients there go back,
micro-batch by micro-batch; no norm leaves its stage, and each process adds noise to its own part of the sum.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import pegrad
from pegrad import random
from pegrad.clipping import PerLayer
from pegrad.distributed.pipelining import pipeline
from pegrad.papers.data import load_digits
from pegrad.papers.models import sequential
from pegrad.papers.models.initialisers import kaiming_fan_in
from pegrad.papers.models.layers import conv, linear, max_pool

BATCH_SIZE = 128
MICROBATCH_SIZE = 16
DELTA = 1e-4

convolutions = sequential(
    conv1=conv(1, 32, 3, initialiser=kaiming_fan_in),
    relu1=F.relu,
    conv2=conv(32, 64, 3, initialiser=kaiming_fan_in),
    pool=max_pool(2),
    flatten=torch.flatten,
)
head = sequential(linear1=linear(256, 128, initialiser=kaiming_fan_in), relu2=F.relu, linear2=linear(128, 10))


def loss(params: dict, example: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of one example: the last stage."""
    x, label = example
    return F.cross_entropy(head.apply(params, x), label)


def shared_key() -> Tensor:
    """Return a fresh key that all processes share."""
    key = random.key()
    dist.broadcast(key, src=0)
    return key


def train(steps: int, noise_multiplier: float) -> None:
    """Train for some steps; the process with the last stage tells the loss."""
    data = load_digits()
    images, labels = data.train_images, data.train_labels
    rate = BATCH_SIZE / len(images)
    rows = pegrad.sampling.PoissonSampler(len(images), rate).rows  # padding masked, so that all batches have one shape
    rows += -rows % MICROBATCH_SIZE
    sampler = pegrad.sampling.PoissonSampler(len(images), rate, max_batch_size=rows)

    clipped = pipeline(
        [convolutions.apply, loss],
        clip_norm=PerLayer(1.0, depth=1),  # each stage to 1/√2: the sensitivity of both together is 1
        microbatch_size=MICROBATCH_SIZE,
        schedule="1F1B",
        normalize_by=BATCH_SIZE,
    )
    start, draws, noise = random.split(shared_key(), 3)
    mine = clipped.local[0]
    params = [(convolutions, head)[mine].init(random.fold_in(start, mine))]
    noise = random.fold_in(noise, mine)  # another key for every stage
    optimizer = pegrad.optim.adam(2e-3)
    state = optimizer.init(params)
    for step in range(steps):
        draw = sampler(draws, step)
        out = clipped(params, pegrad.sampling.gather((images, labels), draw), draw.mask)
        grads = pegrad.add_noise(noise, out.grads, noise_multiplier * clipped.sensitivity, step=step)
        updates, state = optimizer.update(grads, state, params)
        params = pegrad.trees.map(torch.add, params, updates)
        if mine == 1:
            print(f"step {step}: loss {out.losses.sum() / draw.mask.sum():.3f}", flush=True)
    event = pegrad.accounting.dp_event(noise_multiplier=noise_multiplier, sampler=sampler, steps=steps)
    if mine == 1:
        print(f"ε = {pegrad.accounting.epsilon(event, DELTA):.2f} at δ = {DELTA:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--noise-multiplier", type=float, default=1.1)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    train(options.steps, options.noise_multiplier)
    dist.destroy_process_group()
