"""Every error pegrad raises on purpose: one base class, one class for each kind of mistake."""


class PegradError(Exception):
    """Base class of every error that pegrad raises on purpose."""


class ArgumentError(PegradError, ValueError):
    """An argument is outside what the function accepts; the message names it and its value."""


class LeafError(PegradError, TypeError):
    """A leaf of a pytree has the wrong type, dtype or shape; the message names it by its path."""


class LossError(PegradError, TypeError):
    """The loss is not a scalar function of one example, or couples the examples of a batch."""


class StrategyError(LossError, RuntimeError):
    """A strategy cannot run a loss that plain autograd can; the message says why, and which strategy can."""


class CompileError(PegradError, RuntimeError):
    """`pegrad.compile` cannot make a graph of a call, or the graph does not give what the call gives; it says why."""


class MissingExtraError(PegradError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class DataFileError(PegradError, ValueError):
    """A data file is missing, truncated or not of the expected format."""


class BatchOverflowError(PegradError, RuntimeError):
    """A random batch drew more examples than its stated maximum."""


class CheckError(PegradError, RuntimeError):
    """`pegrad.check` found a strategy that differs from the plain loop, or nothing that it could compare.

    Attributes:
        report: the `CheckReport`, or None where nothing could be compared.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class FallbackWarning(UserWarning):
    """`auto` runs a loss as a loop over the examples, because no faster strategy can run it; the message says why."""
