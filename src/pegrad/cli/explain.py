"""`python -m pegrad explain`: what runs at every use of a parameter, for one of the papers' networks."""

import argparse

from rich.console import Console

import pegrad
from pegrad.cli.networks import build


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        PegradError: the image does not suit the model.
    """
    loss, params, batch, title = build(options)
    explanation = pegrad.explain(loss, params, batch, strategy=options.strategy)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{title}: {options.strategy}")
    console.print(str(explanation))
