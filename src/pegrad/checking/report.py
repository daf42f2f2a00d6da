"""What `pegrad.check` found, leaf by leaf: a table that prints, and that renders in a notebook."""

import html
import textwrap
from dataclasses import dataclass
from math import isnan

from pegrad.tables import as_html, as_text

WIDTH = 100
"""Columns that the text fits into."""


@dataclass(frozen=True)
class LeafCheck:
    """How far a strategy was from the loop on one leaf, or on the losses or the norms."""

    path: str
    """Path of the leaf, such as `params['w']`; `losses` or `norms`."""
    shape: tuple[int, ...]
    """Shape of the leaf; `(B,)` for losses and norms."""
    errors: tuple[float, ...]
    """For each of the report's dtypes the greatest relative error, >= 0; NaN where nothing could be compared."""
    verdict: str
    """`same`; `not used`, for a gradient of zero; `sum only`, `gradient only` or `not compared`, where the loop could
    not judge the rest; or `wrong gradient`, `wrong sum`, `wrong gradient and sum`, `wrong`."""

    @property
    def differs(self) -> bool:
        """Whether a difference beyond rounding was found."""
        return self.verdict.startswith("wrong")


@dataclass(frozen=True)
class CheckReport:
    """A table by leaf of how far a strategy was from the loop; prints in 100 columns, and renders in a notebook."""

    strategy: str
    """The strategy that was compared."""
    examples: int
    """How many examples were run."""
    left_out: int
    """How many of them were not compared, since their gradient is not finite in the parameters' dtype."""
    dtypes: tuple[str, ...]
    """In what the comparison was made: `float64` and the parameters' own, or either alone."""
    tolerances: tuple[float, ...]
    """For each of the dtypes the greatest relative error that passes for rounding; in norms and sums it is at least
    1e-4, which the guarantee on the sensitivity leaves them."""
    leaves: tuple[LeafCheck, ...]
    """One for each leaf of the parameters, in flattening order."""
    values: tuple[LeafCheck, ...]
    """One for the losses, one for the norms."""
    notes: tuple[str, ...]
    """What could not be compared, and what else a user should know; whole sentences."""

    @property
    def differing(self) -> tuple[LeafCheck, ...]:
        """The rows in which a difference beyond rounding was found."""
        return tuple(row for row in (*self.leaves, *self.values) if row.differs)

    @property
    def title(self) -> str:
        """What was compared with what, and how strictly."""
        limits = ", ".join(f"{limit:.0e} ({name})" for name, limit in zip(self.dtypes, self.tolerances, strict=True))
        number = f"{self.examples} example{'s' * (self.examples > 1)}"
        return f"{self.strategy} against the plain loop, {number}; tolerance {limits}"

    def __str__(self) -> str:
        """Return the table as text, at most 100 columns wide."""
        notes = [textwrap.fill(note, WIDTH, initial_indent="- ", subsequent_indent="  ") for note in self.notes]
        return "\n".join([*textwrap.wrap(self.title, WIDTH), *as_text(self._table(), WIDTH), *notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<p>{html.escape(self.title)}</p>{as_html(self._table())}" + (f"<ul>{notes}</ul>" if notes else "")

    def _table(self) -> list[tuple[str, ...]]:
        header = ("leaf", "shape", *self.dtypes, "verdict")
        rows = [
            (row.path, "×".join(map(str, row.shape)), *(_number(error) for error in row.errors), row.verdict)
            for row in (*self.leaves, *self.values)
        ]
        return [header, *rows]


def _number(error: float) -> str:
    if isnan(error):
        return "-"
    return "0" if error == 0 else f"{error:.1e}"
