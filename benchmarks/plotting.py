"""Pictures of the benchmarks; each function draws numbers that were measured, and knows nothing of how."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

_INK, _GREY, _LINE = "#333333", "#8a8a8a", "#e4e4e4"


class Mark(NamedTuple):
    """How a contestant looks in every picture."""

    colour: str
    shape: str
    lane: float
    """How far below its row's line it lies, in rows."""
    filled: bool = True


# Ours site by site: filled, blue and green, above the line. By stacked gradients: grey. Peers: hollow, warm, below.
MARKS = {
    "auto": Mark("#1f5fa8", "D", -0.2),
    "book_keeping": Mark("#4c9ed9", "s", -0.2),
    "ghost": Mark("#3a9a6b", "o", -0.2),
    "grouped_conv": Mark("#6f6f6f", "P", 0),
    "vmap": Mark("#6f6f6f", "X", 0),
    "naive": Mark("#6f6f6f", "v", 0),
    "Opacus": Mark("#d1662a", "o", 0.2, filled=False),
    "Opacus ghost": Mark("#d1662a", "D", 0.2, filled=False),
    "BackPACK": Mark("#b03a6f", "s", 0.2, filled=False),
    "JAX-Privacy": Mark("#a08a1c", "^", 0.2, filled=False),
    "JAX, non-private": Mark("#a08a1c", "_", 0.2),
}
_OTHER_MARKS = {"non-private": Mark(_INK, ".", 0), "grouped_conv (grouped)": Mark("#b03a6f", "P", 0)}

Ratios = Mapping[str, Mapping[str, tuple[float, float, float]]]
"""By row and contestant: median, low and high."""


def ratio_dots(panels: Mapping[str, Ratios], title: str, note: str) -> Figure:
    """Draw ratios to the non-private gradient as dots on a logarithmic axis: one row a workload.

    Args:
        panels: by what the ratio is of, all with the same rows.
        title: what was compared.
        note: how and on what it was measured.

    Returns:
        A figure with one panel for each ratio, side by side.
    """
    rows = list(next(iter(panels.values())))
    figure = Figure(figsize=(6.4 * len(panels), 2.2 + 0.55 * len(rows)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=_INK)
    figure.supxlabel(note, fontsize=8, color=_GREY)
    for axes, (name, ratios) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True
    ):
        _ratio_axes(axes, rows, name)
        _dots(axes, rows, ratios)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in MARKS if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _ratio_axes(axes: Axes, rows: list[str], name: str) -> None:
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(name)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.1f}" if value < 3 else ""))
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.hlines(range(len(rows)), 0, 1, transform=axes.get_yaxis_transform(), color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _dots(axes: Axes, rows: list[str], ratios: Ratios) -> None:
    for name, mark in MARKS.items():
        at = [(y, ratios[row][name]) for y, row in enumerate(rows) if name in ratios[row]]
        if not at:
            continue
        heights = [y + mark.lane for y, _ in at]
        middle, low, high = zip(*(ratio for _, ratio in at), strict=True)
        below = [m - at_least for m, at_least in zip(middle, low, strict=True)]
        above = [at_most - m for m, at_most in zip(middle, high, strict=True)]
        axes.errorbar(
            *(middle, heights),
            xerr=(below, above),
            fmt=mark.shape,
            color=mark.colour,
            markerfacecolor=mark.colour if mark.filled else "white",
            markersize=7,
            elinewidth=1,
            label=name,
        )


def runtime_lines(
    panels: Mapping[str, tuple[str, Mapping[str, list[tuple[float, float]]]]], title: str, note: str
) -> Figure:
    """Draw seconds against one size: a panel for each network, a line for each strategy.

    Args:
        panels: by title, the name of the axis and, by strategy, the points `(place, seconds)`.
        title: what was timed.
        note: how and on what it was measured.
    """
    figure = Figure(figsize=(1.5 + 3.6 * len(panels), 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=_INK)
    figure.supxlabel(note, fontsize=8, color=_GREY)
    for axes, (name, (axis, lines)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label, points in lines.items():
            mark = MARKS.get(label, _OTHER_MARKS.get(label, Mark(_INK, ".", 0)))
            style = "--" if label not in MARKS else "-"
            axes.plot(*zip(*points, strict=True), style, marker=mark.shape, color=mark.colour, label=label)
        axes.set(title=name, xlabel=axis, yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
    figure.axes[0].set_ylabel("seconds")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure
