"""Per-example gradients and differentially private SGD for pure PyTorch functions."""

from pegrad import models, optim, random
from pegrad.dp_sgd import DPSGD, Metrics, State, Step, add_noise, dp_sgd
from pegrad.errors import (
    ArgumentError,
    BatchOverflowError,
    DataFileError,
    LeafError,
    LossError,
    MissingExtraError,
    PegradError,
)
from pegrad.per_example import (
    Clipped,
    ClippedGrad,
    PerExample,
    clipped_grad,
    per_example_grad,
    per_example_norm,
    per_example_value_and_grad,
)
from pegrad.rules.conv import KERNELS
from pegrad.strategies import STRATEGIES, Auto, BookKeeping, Ghost, GroupedConv, Naive, Strategy, Vmap

__version__ = "0.1.0"

__all__ = [
    "DPSGD",
    "KERNELS",
    "STRATEGIES",
    "ArgumentError",
    "Auto",
    "BatchOverflowError",
    "BookKeeping",
    "Clipped",
    "ClippedGrad",
    "DataFileError",
    "Ghost",
    "GroupedConv",
    "LeafError",
    "LossError",
    "Metrics",
    "MissingExtraError",
    "Naive",
    "PegradError",
    "PerExample",
    "State",
    "Step",
    "Strategy",
    "Vmap",
    "add_noise",
    "clipped_grad",
    "dp_sgd",
    "models",
    "optim",
    "per_example_grad",
    "per_example_norm",
    "per_example_value_and_grad",
    "random",
]
