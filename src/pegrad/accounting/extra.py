"""dp-accounting, which is optional: it is imported when a function needs it."""

import importlib
from types import ModuleType

from pegrad.errors import MissingExtraError


def dp_accounting() -> ModuleType:
    """Import dp-accounting.

    Raises:
        MissingExtraError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise MissingExtraError(
            'Accounting needs dp-accounting, which is not installed: pip install "pegrad[accounting]".'
        ) from error
