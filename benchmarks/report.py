"""What contests measured, as tables and as the ratios that pictures draw."""

from collections.abc import Mapping

from rich.table import Table

import plotting
import runner
from contestants import BASELINE, REFERENCE
from runner import Point
from workloads import Workload


def caption(row: str, workload: Workload) -> str:
    """Name a workload, its batch and the size of an example."""
    return f"{row}, B={workload.batch_size}, {workload.size}"


def joined(time: Point, memory: Point) -> Point:
    """Put what `contest` and `memory` returned for one contestant together; a failure is that of `contest`."""
    return time | {"peak_bytes": memory.get("peak_bytes")}


def gradient_table(title: str, points: Mapping[str, Point]) -> Table:
    """Lay out what `contest` and `memory` returned for each contestant, `joined`, by name."""
    base = points[BASELINE].get("peak_bytes")
    made = table(title, "clipped gradient", "seconds", "× non-private", "rounds", "peak MB", "× memory", "difference")
    for name, point in points.items():
        if "failure" in point:
            made.add_row(name, *[""] * 5, point["failure"], style="dim")
            continue
        difference = point["difference"]
        made.add_row(
            name,
            f"{runner.spread(point['seconds'])['median']:.3f}",
            with_quartiles(point["ratio"]),
            str(len(point["seconds"])),
            megabytes(point["peak_bytes"]),
            f"{point['peak_bytes'] / base:.2f}" if point["peak_bytes"] and base else "",
            "reference" if name == REFERENCE else "" if difference is None else f"{difference:.1e}",
        )
    return made


def table(title: str, first: str, *headings: str) -> Table:
    """Make a table whose numbers stand to the right."""
    made = Table(title=title, title_justify="left", min_width=len(title))
    made.add_column(first, no_wrap=True)
    for heading in headings:
        made.add_column(heading, justify="right")
    return made


def with_quartiles(ratio: Point) -> str:
    """Write the spread of a ratio."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} – {ratio['high']:.2f})"


def megabytes(count: int | None) -> str:
    """Write bytes as megabytes, or nothing for None."""
    return "" if count is None else f"{count / 1e6:.0f}"


def ratios(
    measured: Mapping[str, Mapping[str, Point]], workloads: Mapping[str, Workload]
) -> dict[str, plotting.Ratios]:
    """Gather time and peak memory over the non-private gradient's: `time` and `peak memory`, by caption and name.

    Args:
        measured: what `contest` and `memory` returned, `joined`, by row and contestant; failures are left out.
        workloads: by row.
    """
    times: dict[str, dict[str, tuple[float, float, float]]] = {}
    memories: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row, points in measured.items():
        ran = {name: point for name, point in points.items() if name != BASELINE and "failure" not in point}
        place, base = caption(row, workloads[row]), points[BASELINE].get("peak_bytes")
        times[place] = {n: (p["ratio"]["median"], p["ratio"]["low"], p["ratio"]["high"]) for n, p in ran.items()}
        memories[place] = {n: (p["peak_bytes"] / base,) * 3 for n, p in ran.items() if p["peak_bytes"] and base}
    return {"time": times, "peak memory": memories}
