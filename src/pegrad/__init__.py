"""Per-example gradients and differentially private SGD for pure PyTorch functions."""

from pegrad import accounting, auditing, clipping, modules, optim, random, sampling
from pegrad.accounting.ledger import Entry, Ledger
from pegrad.accumulation import Added, Sums
from pegrad.adaptive import Adaptive
from pegrad.autotune import autotune
from pegrad.check import check
from pegrad.checking.report import CheckReport, LeafCheck
from pegrad.checkpointing import checkpoint
from pegrad.compiling import Compiled, CompileReport, compile
from pegrad.dp_sgd import DPSGD, Metrics, Release, State, Step, add_noise, dp_sgd
from pegrad.errors import (
    ArgumentError,
    BatchOverflowError,
    CheckError,
    CompileError,
    DataFileError,
    FallbackWarning,
    LeafError,
    LossError,
    MissingExtraError,
    PegradError,
    StrategyError,
)
from pegrad.explain import Explanation, explain
from pegrad.memory import largest_microbatch
from pegrad.modules import from_module, to_module
from pegrad.per_example import (
    Clipped,
    ClippedGrad,
    PerExample,
    clipped_grad,
    per_example_grad,
    per_example_norm,
    per_example_value_and_grad,
)
from pegrad.rules import RULES
from pegrad.rules.conv import KERNELS
from pegrad.rules.operation import operation
from pegrad.rules.site import Kernel, Site
from pegrad.statistics import (
    Moments,
    NoiseScale,
    gradient_gram,
    gradient_moments,
    gradient_noise_scale,
    per_example_dot,
)
from pegrad.strategies import STRATEGIES, Auto, BookKeeping, Ghost, GroupedConv, Naive, Stacking, Strategy, Vmap

__version__ = "0.3.0"

__all__ = [
    "DPSGD",
    "KERNELS",
    "RULES",
    "STRATEGIES",
    "Adaptive",
    "Added",
    "ArgumentError",
    "Auto",
    "BatchOverflowError",
    "BookKeeping",
    "CheckError",
    "CheckReport",
    "Clipped",
    "ClippedGrad",
    "CompileError",
    "CompileReport",
    "Compiled",
    "DataFileError",
    "Entry",
    "Explanation",
    "FallbackWarning",
    "Ghost",
    "GroupedConv",
    "Kernel",
    "LeafCheck",
    "LeafError",
    "Ledger",
    "LossError",
    "Metrics",
    "MissingExtraError",
    "Moments",
    "Naive",
    "NoiseScale",
    "PegradError",
    "PerExample",
    "Release",
    "Site",
    "Stacking",
    "State",
    "Step",
    "Strategy",
    "StrategyError",
    "Sums",
    "Vmap",
    "accounting",
    "add_noise",
    "auditing",
    "autotune",
    "check",
    "checkpoint",
    "clipped_grad",
    "clipping",
    "compile",
    "dp_sgd",
    "explain",
    "from_module",
    "gradient_gram",
    "gradient_moments",
    "gradient_noise_scale",
    "largest_microbatch",
    "modules",
    "operation",
    "optim",
    "per_example_dot",
    "per_example_grad",
    "per_example_norm",
    "per_example_value_and_grad",
    "random",
    "sampling",
    "to_module",
]
