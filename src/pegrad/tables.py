"""Tables for people: as text of a bounded width, and as HTML for a notebook."""

import html
import textwrap
from collections.abc import Sequence

Row = Sequence[str]


def as_text(table: Sequence[Row], width: int) -> list[str]:
    """Lay out a table in columns.

    Args:
        table: rows of one length, the header first.
        width: columns that no line exceeds. A first cell that is too long has a line of its own; a last one is cut.

    Returns:
        The lines, a rule below the header.
    """
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    gaps = 2 * (len(widths) - 1)
    spare = width - gaps - sum(widths[1:])
    widths[0] = min(widths[0], max(spare, len(table[0][0])))
    widths[-1] = min(widths[-1], max(width - gaps - sum(widths[:-1]), len(table[0][-1])))
    lines = []
    for first, *others in table:
        if len(first) > widths[0]:
            lines += textwrap.wrap(first, width)
            first = ""
        cells = zip((first, *others), widths, strict=True)
        lines.append("  ".join(_cut(cell, room).ljust(room) for cell, room in cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def as_html(table: Sequence[Row]) -> str:
    """Return a table, the header first, as HTML."""

    def row(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header, *body = table
    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in body)}</table>"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"
