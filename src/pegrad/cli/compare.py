"""`python -m pegrad compare`: the strategies side by side, for one of the papers' networks."""

import argparse

from rich.console import Console

from pegrad.cli.networks import build
from pegrad.cli.tables import timings
from pegrad.papers import comparison
from pegrad.rules.conv import KERNELS
from pegrad.strategies import STRATEGIES, GroupedConv, Strategy


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: the image does not suit the model.
    """
    loss, params, batch, title = build(options)
    contestants = _contestants(options)
    rows = comparison.compare(loss, params, batch, contestants, question=options.question, repeats=options.repeats)
    Console().print(timings(f"{title}: {options.question}", rows))


def _contestants(options: argparse.Namespace) -> dict[str, Strategy]:
    chosen = {name: STRATEGIES[name] for name in options.strategies}
    kernels = {f"grouped_conv, {kernel}": GroupedConv(kernel) for kernel in KERNELS} if options.kernels else {}
    return {**chosen, **kernels}
