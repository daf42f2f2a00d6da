"""Checks of numbers that a user gives: one place, one wording."""

from numbers import Real

from pegrad.errors import ArgumentError

LEAST, GREATEST = 1e-9, 1e9


def check_positive(name: str, value: float) -> None:
    """Raise `ArgumentError` unless `value` is a finite number above zero."""
    if not 0 < value < float("inf"):
        raise ArgumentError(f"Expected {name} to be a finite number > 0, got {name}={value}")


def check_scale(name: str, value: float) -> None:
    """Raise `ArgumentError` unless `value` is a number that float32 gradients can be measured by."""
    if not isinstance(value, Real):
        raise ArgumentError(f"Expected {name} to be a number, got {type(value).__name__}")
    if not LEAST <= value <= GREATEST:
        raise ArgumentError(
            f"Expected {name} to be between {LEAST:g} and {GREATEST:g}, got {name}={value}: beyond, float32 "
            "gradients vanish or overflow. Scale the loss instead"
        )


def check_size(name: str, size: int | None) -> None:
    """Raise `ArgumentError` unless `size` is None or a whole number >= 1."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ArgumentError(f"Expected {name} to be None or a whole number >= 1, got {name}={size}")


def check_integer(name: str, value: int, least: int) -> None:
    """Raise `ArgumentError` unless `value` is a whole number >= `least`."""
    if not isinstance(value, int) or value < least:
        raise ArgumentError(f"Expected {name} to be an integer >= {least}, got {name}={value!r}.")


def check_rate(name: str, value: float) -> None:
    """Raise `ArgumentError` unless `value` is a probability above zero."""
    if not 0 < value <= 1:
        raise ArgumentError(f"Expected 0 < {name} <= 1, got {name}={value}.")
