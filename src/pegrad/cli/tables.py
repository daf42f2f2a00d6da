"""Tables for the terminal."""

from collections.abc import Iterable

from rich.table import Table

from pegrad.papers.comparison import BASELINE, Row, machine


def timings(title: str, rows: Iterable[Row]) -> Table:
    """Lay out a comparison: a line for each row, under a title, over what it was measured on."""
    host = machine()
    caption = f"{host['processor']}, {host['threads']} threads, torch {host['torch']}"
    table = Table(title=title, caption=caption)
    table.add_column("", no_wrap=True)
    table.add_column("time, ms", justify="right")
    table.add_column("× non-private", justify="right")
    table.add_column("difference to vmap", justify="right")
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        style = "dim" if row.name == BASELINE else None
        table.add_row(row.name, f"{1e3 * row.seconds:.1f}", f"{row.ratio:.2f}", difference, style=style)
    return table
