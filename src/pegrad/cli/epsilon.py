"""`python -m pegrad epsilon`: what a run of DP-SGD costs."""

import argparse

from rich.console import Console

from pegrad.cli.runs import Run, number_of_steps, sampling_rate, table


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: a number out of its bounds, or a missing package.
    """
    rate = sampling_rate(options)
    assert rate is not None, "one of the two options is required"
    steps = number_of_steps(options, rate)
    assert steps is not None, "one of the two options is required"
    found = Run(options.num_examples, rate, options.noise_multiplier, steps, options.delta)
    Console(highlight=False).print(table("privacy of a run", found, "epsilon"))
