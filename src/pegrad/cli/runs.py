"""A run of DP-SGD as the accountant sees it, from the options of `epsilon` and `calibrate`."""

import argparse
import decimal
import math
from functools import cache
from typing import Literal, NamedTuple

from rich.table import Table

from pegrad import accounting
from pegrad.errors import ArgumentError
from pegrad.sampling import PoissonSampler

Accountant = Literal["pld", "rdp"]


class Run(NamedTuple):
    """Five numbers that determine epsilon: Poisson samples, the Gaussian mechanism, one example added or removed."""

    num_examples: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    delta: float

    @property
    def sampler(self) -> PoissonSampler:
        """How batches are drawn."""
        return PoissonSampler(self.num_examples, self.sampling_rate)

    def epsilon(self, accountant: Accountant = "pld") -> float:
        """Return what the run costs.

        Raises:
            ArgumentError: a number is out of its bounds, or delta is too small for the size of the batches.
        """
        return _epsilon(self, accountant)


@cache  # a search ends at a run whose cost it knows
def _epsilon(run: Run, accountant: Accountant) -> float:
    event = accounting.dp_event(run.noise_multiplier, run.sampler, run.steps)
    return accounting.epsilon(event, run.delta, accountant)


def sampling_rate(options: argparse.Namespace) -> float | None:
    """Return q as it was given, or by the mean size of a batch; None: neither was.

    Raises:
        ArgumentError: batches are larger than the data set.
    """
    if options.batch_size is None:
        return options.sampling_rate
    if options.batch_size > options.num_examples:
        raise ArgumentError(
            f"Expected a mean batch of at most num_examples={options.num_examples}, got batch_size={options.batch_size}"
        )
    return options.batch_size / options.num_examples


def number_of_steps(options: argparse.Namespace, rate: float) -> int | None:
    """Return the steps as they were given, or by the number of passes over the data set; None: neither was."""
    return options.steps if options.epochs is None else max(1, round(options.epochs / rate))


def table(title: str, run: Run, found: str | None = None) -> Table:
    """Lay out a run and what it costs by both accountants.

    Args:
        title: above the table.
        run: the run.
        found: name of the number that was looked for, which is marked.

    Raises:
        ArgumentError: as `Run.epsilon`.
    """
    lines = Table(title=title, show_header=False)
    lines.add_column(no_wrap=True)
    lines.add_column(justify="right")
    rows = {
        "num_examples": ("examples", f"{run.num_examples}"),
        "sampling_rate": ("sampling rate q", f"{run.sampling_rate:.6g}"),
        "batch_size": ("examples in a batch, on average", f"{run.num_examples * run.sampling_rate:.6g}"),
        "noise_multiplier": ("noise multiplier σ", f"{run.noise_multiplier:.6g}"),
        "steps": ("steps", f"{run.steps}"),
        "epochs": ("passes over the data set", f"{run.steps * run.sampling_rate:.4g}"),
        "delta": ("δ", f"{run.delta:.6g}"),
        "epsilon": ("ε", _upwards(run.epsilon())),
        "rdp": ("ε by Rényi divergences alone", _upwards(run.epsilon("rdp"))),
    }
    for name, row in rows.items():
        lines.add_row(*row, style="bold" if name == found else None)
    return lines


def _upwards(bound: float) -> str:
    """Write an upper bound with five digits, none of them rounded down."""
    return str(bound) if math.isinf(bound) else f"{_FIVE_DIGITS.create_decimal(bound):g}"


_FIVE_DIGITS = decimal.Context(prec=5, rounding=decimal.ROUND_CEILING)
