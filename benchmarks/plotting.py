"""Pictures of the benchmarks; each function draws numbers that were measured, and knows nothing of how."""

from collections.abc import Mapping, Sequence
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
    "ghost only": Mark("#8a6fb0", "^", 0),
    "instantiate only": Mark("#8a6fb0", "v", 0),
    "per leaf": Mark("#1f5fa8", "o", -0.1),
    "per leaf, ghost": Mark("#3a9a6b", "o", -0.1, filled=False),
    "per layer": Mark("#1f5fa8", "s", 0),
    "per layer, ghost": Mark("#3a9a6b", "s", 0, filled=False),
    "automatic": Mark("#1f5fa8", "^", 0.1),
    "automatic, ghost": Mark("#3a9a6b", "^", 0.1, filled=False),
    "Opacus per layer": Mark("#d1662a", "s", 0.2, filled=False),
    "mixed, published rule": Mark("#8a6fb0", "D", 0),
    "grouped_conv": Mark("#6f6f6f", "P", 0),
    "vmap": Mark("#6f6f6f", "X", 0),
    "naive": Mark("#6f6f6f", "v", 0),
    "Opacus": Mark("#d1662a", "o", 0.2, filled=False),
    "Opacus ghost": Mark("#d1662a", "D", 0.2, filled=False),
    "BackPACK": Mark("#b03a6f", "s", 0.2, filled=False),
    "JAX-Privacy": Mark("#a08a1c", "^", 0.2, filled=False),
    "JAX, non-private": Mark("#a08a1c", "_", 0.2),
}
_OTHER_MARKS = {
    "non-private": Mark(_INK, ".", 0),
    "grouped_conv (grouped)": Mark("#b03a6f", "^", 0),
    "grouped_conv (grouped_backward)": Mark("#d1662a", "v", 0),
    "grouped_conv (unfold)": Mark("#a08a1c", "s", 0),
}

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
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.1f}" if 1 < value < 3 else ""))
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


def choices(networks: Mapping[str, Sequence[Mapping[str, Any]]], title: str, note: str) -> Figure:
    """Draw every layer where its T² and D p put it: its mark is the fastest kernel, the line is where the rule turns.

    Args:
        networks: by name, layers with `positions` T, `numbers` D p and `fastest`, the name of a kernel.
        title: what was chosen.
        note: how and on what it was measured.

    Returns:
        A figure with a panel for each network: left of the line, Bu, Mao & Xu's rule takes Gram matrices.
    """
    columns = min(4, len(networks))
    rows = -(-len(networks) // columns)
    figure = Figure(figsize=(3 + 2.8 * columns, 1.5 + 2.8 * rows), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=_INK)
    figure.supxlabel(f"2 T²\n{note}", fontsize=9, color=_GREY)
    figure.supylabel("D p", fontsize=9, color=_GREY)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes in list(grid)[len(networks) :]:
        axes.remove()
    handles: dict[str, Any] = {}
    for axes, (name, layers) in zip(figure.axes, networks.items(), strict=True):
        axes.set(title=name, xscale="log", yscale="log")
        axes.axline((1e3, 1e3), (1e6, 1e6), color=_INK, linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        for layer in layers:
            mark = _KERNELS[layer["fastest"]]
            at = 2 * layer["positions"] ** 2, layer["numbers"]
            style = {"color": mark.colour, "markerfacecolor": mark.colour if mark.filled else "white"}
            (handles[layer["fastest"]],) = axes.plot(*at, mark.shape, markersize=7, **style)
    order = [kernel for kernel in _KERNELS if kernel in handles]
    figure.legend([handles[kernel] for kernel in order], order, loc="outside right center", frameon=False, fontsize=9)
    return figure


# Gram matrices: filled and blue or green; stacked gradients: hollow and warm.
_KERNELS = {
    "gram": Mark("#1f5fa8", "D", 0),
    "gram_unfolded": Mark("#4c9ed9", "s", 0),
    "gram_box": Mark("#3a9a6b", "o", 0),
    "product": Mark("#a08a1c", "D", 0, filled=False),
    "unfold": Mark("#d1662a", "s", 0, filled=False),
    "offset": Mark("#b03a6f", "o", 0, filled=False),
    "grouped": Mark("#d1662a", "^", 0, filled=False),
    "grouped_backward": Mark("#b03a6f", "v", 0, filled=False),
    "loop": Mark("#6f6f6f", "P", 0, filled=False),
}


def memory_by_batch(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, note: str) -> Figure:
    """Draw peak memory against the size of a batch; what takes constant memory is flat.

    Args:
        lines: by name, the points `(batch size, bytes)`; one without points is left out.
        title: memory of what.
        note: how and on what it was measured.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=_INK)
    figure.supxlabel(note, fontsize=8, color=_GREY)
    axes = figure.subplots()
    for (name, points), shape, colour in zip(lines.items(), "vsD", (_GREY, "#d1662a", "#1f5fa8"), strict=True):
        if points:
            sizes, needed = zip(*points, strict=True)
            axes.plot(sizes, [count / 1e6 for count in needed], marker=shape, color=colour, label=name)
    axes.set(xscale="log", xlabel="examples in the logical batch", ylabel="peak MB")
    axes.set_ylim(bottom=0)
    ticks = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return figure


def accuracy_by_copies(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, Sequence[float]]]]], title: str, note: str
) -> Figure:
    """Draw accuracies against augmentation multiplicity: a panel for each data set, a line for each clipping.

    Args:
        panels: by data set and clipping, the points `(K, accuracy of each seed)`.
        title: accuracy of what.
        note: how it was measured.

    Returns:
        A figure of means, with bars from the least to the greatest seed.
    """
    figure = Figure(figsize=(1.5 + 4 * len(panels), 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=_INK)
    figure.supxlabel(note, fontsize=8, color=_GREY)
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        looks = zip("Dos^", ("#1f5fa8", "#d1662a", "#3a9a6b", "#b03a6f"), strict=True)
        for lane, ((clipping, points), (shape, colour)) in enumerate(zip(lines.items(), looks, strict=True)):
            places = [copies * 1.06 ** (lane - 1.5) for copies, _ in points]  # side by side
            means = [sum(seeds) / len(seeds) for _, seeds in points]
            below = [middle - min(seeds) for middle, (_, seeds) in zip(means, points, strict=True)]
            above = [max(seeds) - middle for middle, (_, seeds) in zip(means, points, strict=True)]
            style = {"marker": shape, "color": colour, "elinewidth": 1, "label": clipping}
            axes.errorbar(places, means, yerr=(below, above), **style)
        ticks = [copies for copies, _ in next(iter(lines.values()))]
        axes.set(title=name, xscale="log", xlabel="K, copies of an image")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def accuracy_by_budget(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, note: str) -> Figure:
    """Draw accuracies against privacy budgets.

    Args:
        lines: by name, the points `(epsilon, accuracy)`; the first is ours.
        title: accuracy of what.
        note: how it was measured.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=_INK)
    figure.supxlabel(note, fontsize=8, color=_GREY)
    axes = figure.subplots()
    shapes = zip(lines.items(), "Dosv^", ("#1f5fa8", "#d1662a", "#b03a6f", "#a08a1c", _GREY), strict=False)
    for (name, points), shape, colour in shapes:
        axes.plot(*zip(*points, strict=True), marker=shape, color=colour, label=name)
    axes.set(xscale="log", xlabel="ε")
    ticks = sorted({epsilon for epsilon, _ in next(iter(lines.values()))})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1%}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    return figure
