"""What can be typed after `python -m pegrad`, and which combinations make sense."""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pegrad.papers.comparison import QUESTIONS
from pegrad.papers.models import MODELS
from pegrad.papers.training import CLIPPINGS, PRESETS
from pegrad.strategies import STRATEGIES

_ONLY_WITH_DP = ("strategy", "noise_multiplier", "epsilon", "delta", "clipping", "clip_norm", "microbatch_size")
_ONLY_WITH_ADAPTIVE = ("quantile", "count_noise_multiplier", "clip_learning_rate")

_TRAIN = """Train the MNIST network of Rochette et al. 2019, with DP-SGD or without, and time the strategies on it.

The parameters that come out are (epsilon, delta)-private as stated. Losses and gradient norms, on the screen, in
metrics.json and in training.png, are those of single training examples and NOT private: they are for the
experimenter's eyes. Nor does epsilon cover a choice of options made by looking at the results.

After every epoch, and a tenth of the run if that is less, what it needs to go on is kept in checkpoint.pt in --out: if
it is cut off, give the same options and --resume. The file holds the run's key, so it must stay secret; it is removed
when the run is over."""

_COMPARE = """Time the strategies in turns with the gradient of the mean loss, the one that training without privacy
needs, on random images; and tell how far each answer is from that of vmap."""

_EXPLAIN = """Say how the norms and the clipped sum of per-example gradients are found, use by use of every parameter,
for one of the papers' networks on random images."""

_EPSILON = """Say what a run of DP-SGD costs: batches drawn by Poisson sampling, each step a sum of clipped gradients
plus Gaussian noise, neighbours that differ by one example added or removed."""

_CALIBRATE = """Find the one number of a run that is left out, so that the run costs at most epsilon: the least noise,
the most steps, the largest batches, or the least delta. Give the others."""


def _checked(kind: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """Make the converter of an option's text, whose error says what was expected."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError, RuntimeError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return convert


def _is_here(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())


_positive = _checked(float, lambda value: 0 < value < math.inf, "a number > 0")
_not_negative = _checked(float, lambda value: 0 <= value < math.inf, "a number >= 0")
_probability = _checked(float, lambda value: 0 < value < 1, "a number between 0 and 1")
_rate = _checked(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
_fraction = _checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
_count = _checked(int, lambda value: value >= 1, "a whole number >= 1")
_natural = _checked(int, lambda value: value >= 0, "a whole number >= 0")
_device = _checked(torch.device, _is_here, "cpu, or cuda where there is such a device")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The options, `command` being the name of a module of `pegrad.cli`. Options of `train` that were not given are
        None.

    Raises:
        SystemExit: the arguments make no sense; the reason is on the standard error.
    """
    parser = argparse.ArgumentParser("pegrad", description="Per-example gradients and differentially private SGD.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_compare(commands)
    _add_explain(commands)
    _add_epsilon(commands)
    calibrate = _add_calibrate(commands)
    train = _add_train(commands)
    options = parser.parse_args(argv)
    if options.command == "train":
        _check_train(train, options)
    if options.command == "calibrate":
        _check_calibrate(calibrate, options)
    return options


def _add_train(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("train", description=_TRAIN, help="train, with differential privacy or without")
    parser.add_argument("--data", choices=[*PRESETS], default="digits", help="data set (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="MNIST's IDX files (default: $PEGRAD_DATA/mnist)")
    parser.add_argument("--dp", action=argparse.BooleanOptionalAction, default=True, help="train by DP-SGD")
    parser.add_argument("--strategy", choices=[*STRATEGIES], help="how per-example gradients are computed")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--noise-multiplier", type=_not_negative, metavar="SIGMA", help="noise std / sensitivity")
    noise.add_argument("--epsilon", type=_positive, metavar="EPS", help="budget that the noise is calibrated to")
    parser.add_argument("--delta", type=_probability, help="delta of the guarantee")
    parser.add_argument("--clipping", choices=[*CLIPPINGS], help="how gradients are clipped (default: flat)")
    parser.add_argument("--clip-norm", type=_positive, metavar="C", help="bound on each example's gradient norm")
    adaptive = parser.add_argument_group("of --clipping adaptive", "where --clip-norm is but the first bound")
    adaptive.add_argument("--quantile", type=_fraction, metavar="Q", help="examples to leave unclipped (default: 0.5)")
    adaptive.add_argument(
        "--count-noise-multiplier",
        type=_not_negative,
        metavar="SIGMA",
        help="noise std / sensitivity of the counts, above that of the whole step (default: a tenth of --batch-size)",
    )
    adaptive.add_argument(
        "--clip-learning-rate", type=_positive, metavar="R", help="how fast the bound moves (default: 0.2)"
    )
    parser.add_argument("--microbatch-size", type=_count, metavar="M", help="examples at a time (default: all)")
    parser.add_argument("--batch-size", type=_count, metavar="B", help="examples in a batch, on average with DP-SGD")
    parser.add_argument("--epochs", type=_positive, help="passes over the training set, or a part of one")
    parser.add_argument("--lr", type=_positive, help="Adam's learning rate")
    parser.add_argument("--seed", type=_natural, help="repeat an experiment; not private (default: OS entropy)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write metrics.json and training.png")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was cut off in --out")
    _add_device(parser)
    parser.epilog = "Defaults: " + "; ".join(f"{name}: {_preset(name)}" for name in PRESETS) + "."
    return parser


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compare", description=_COMPARE, help="time the strategies side by side")
    _add_network(parser)
    parser.add_argument("--repeats", type=_count, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=[*STRATEGIES],
        default=[*STRATEGIES],
        metavar="S",
        help=f"some of {', '.join(STRATEGIES)} (default: all)",
    )
    parser.add_argument(
        "--question",
        choices=[*QUESTIONS],
        default="clipped",
        help="every gradient, their norms, or the sum of the clipped ones (default: %(default)s)",
    )
    parser.add_argument("--kernels", action="store_true", help="also grouped_conv by each convolution kernel")


def _add_explain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("explain", description=_EXPLAIN, help="say what runs, use by use")
    _add_network(parser)
    parser.add_argument(
        "--strategy",
        choices=["auto", "book_keeping", "ghost"],
        default="auto",
        help="how norms and sums are found (default: %(default)s)",
    )


def _add_epsilon(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("epsilon", description=_EPSILON, help="say what a run of DP-SGD costs")
    _add_run(parser, required=True)


def _add_calibrate(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "calibrate", description=_CALIBRATE, help="find the noise, or another number, of a run"
    )
    parser.add_argument("--epsilon", type=_positive, required=True, metavar="EPS", help="what the run may cost")
    _add_run(parser, required=False)
    return parser


def _add_run(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add what determines the cost of a run."""
    parser.add_argument("--num-examples", type=_count, required=True, metavar="N", help="size of the data set")
    batches = parser.add_mutually_exclusive_group(required=required)
    batches.add_argument("--batch-size", type=_positive, metavar="B", help="mean number of examples in a batch")
    batches.add_argument("--sampling-rate", type=_rate, metavar="Q", help="probability of an example to be drawn")
    duration = parser.add_mutually_exclusive_group(required=required)
    duration.add_argument("--steps", type=_count, metavar="T", help="batches")
    duration.add_argument("--epochs", type=_positive, metavar="E", help="batches, in passes over the data set")
    parser.add_argument(
        "--noise-multiplier", type=_positive, required=required, metavar="SIGMA", help="noise std / sensitivity"
    )
    parser.add_argument("--delta", type=_probability, required=required, help="delta of the guarantee")


def _check_calibrate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    choices = {
        "--noise-multiplier": options.noise_multiplier,
        "--steps": options.steps or options.epochs,
        "--batch-size": options.batch_size or options.sampling_rate,
        "--delta": options.delta,
    }
    missing = [name for name, value in choices.items() if value is None]
    if len(missing) != 1:
        parser.error(f"leave out one of {', '.join(choices)}, to be found; got {4 - len(missing)} of the four")
    if missing == ["--batch-size"] and options.epochs is not None:
        parser.error("argument --epochs: not allowed without --batch-size or --sampling-rate; give --steps")


def _add_network(parser: argparse.ArgumentParser) -> None:
    """Add what makes one of the papers' networks and a batch."""
    parser.add_argument("--model", choices=[*MODELS], default="mnist_cnn", help="network (default: %(default)s)")
    parser.add_argument("--batch-size", type=_count, default=32, metavar="B", help="examples (default: %(default)s)")
    parser.add_argument("--image-size", type=_count, metavar="N", help="height and width (default: the model's)")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")


def _check_train(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.data == "digits" and options.data_dir is not None:
        parser.error("argument --data-dir: not allowed with --data digits, which scikit-learn ships")
    if options.data == "mnist" and options.data_dir is None:
        if "PEGRAD_DATA" not in os.environ:
            parser.error("argument --data mnist: needs --data-dir, or PEGRAD_DATA in the environment")
        options.data_dir = Path(os.environ["PEGRAD_DATA"]) / "mnist"
    if options.resume and options.out is None:
        parser.error("argument --resume: needs --out, the folder of the run that was cut off")
    if not options.dp:
        _refuse(parser, options, _ONLY_WITH_DP, "with --no-dp")
    if options.clipping != "adaptive":
        _refuse(parser, options, _ONLY_WITH_ADAPTIVE, "without --clipping adaptive")


def _refuse(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str], where: str) -> None:
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        parser.error(f"argument --{given[0].replace('_', '-')}: not allowed {where}")


def _preset(name: str) -> str:
    settings, privacy = PRESETS[name]
    values = {**vars(settings), **vars(privacy)}
    return ", ".join(f"{key} {value:g}" for key, value in values.items() if isinstance(value, float | int))
