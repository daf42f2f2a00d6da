"""The command line: `python -m pegrad`, with a command."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from pegrad.cli.arguments import parse
from pegrad.errors import MissingExtraError, PegradError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 1 after one line on the standard error that says what went wrong.

    Raises:
        SystemExit: with status 2 for arguments that make no sense, with 0 after `--help`.
    """
    options = parse(argv)
    try:
        _command(options.command).run(options)
    except (PegradError, OSError) as error:
        print(f"pegrad: {error}", file=sys.stderr)
        return 1
    return 0


def _command(name: str) -> ModuleType:
    """Import a command's module, and with it the packages that only the command line needs."""
    try:
        return importlib.import_module(f"pegrad.cli.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pegrad"):
            raise
        raise MissingExtraError(
            f'The command line needs {error.name}, which is not installed: pip install "pegrad[train]"'
        ) from error


if __name__ == "__main__":
    sys.exit(main())
