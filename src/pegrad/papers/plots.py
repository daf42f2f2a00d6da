"""Pictures of a training run; needs matplotlib, which the extra `train` brings."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pegrad.papers.training import Evaluation

_BLUE, _ORANGE, _INK, _GREY = "#2f6db5", "#e0862c", "#333333", "#8a8a8a"
_BINS = 60
_DECADES_BELOW_CLIP_NORM = 6  # what is shorter still counts in the histogram's first bin


def private_training(history: Sequence[Evaluation], norms: Sequence[Tensor], clip_norm: float, title: str) -> Figure:
    """Draw a run of DP-SGD: accuracy against ε, and how long the gradients were that were clipped.

    Args:
        history: the run's evaluations, each with its ε.
        norms: each step's gradient norms over all leaves `(B,)`, before clipping.
        clip_norm: the bound C on a clipped gradient over all leaves.
        title: what the run was.

    Returns:
        A figure of two panels.
    """
    figure, (left, right) = _panels(title)
    _accuracy(left, [point.epsilon or 0.0 for point in history], history)
    left.set_xlabel("privacy spent, ε")
    _norms(right, norms, clip_norm)
    return figure


def plain_training(history: Sequence[Evaluation], losses: Sequence[float], title: str) -> Figure:
    """Draw a run without privacy: accuracy and training loss, step by step.

    Args:
        history: the run's evaluations.
        losses: each step's mean loss.
        title: what the run was.

    Returns:
        A figure of two panels.
    """
    figure, (left, right) = _panels(title)
    _accuracy(left, [point.step for point in history], history)
    left.set_xlabel("step")
    right.plot(range(1, len(losses) + 1), losses, color=_ORANGE, linewidth=1)
    right.set(xlabel="step", ylabel="loss of the batch", yscale="log", title="Training loss")
    return figure


def _panels(title: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_GREY)
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _accuracy(axes: Axes, at: Sequence[float], history: Sequence[Evaluation]) -> None:
    percent = [100 * point.test_accuracy for point in history]
    axes.plot(at, percent, color=_BLUE, marker="o", markersize=5, linewidth=2)
    axes.annotate(
        f"{percent[-1]:.1f}%",
        (at[-1], percent[-1]),
        xytext=(0, -18),
        textcoords="offset points",
        ha="center",
        color=_BLUE,
        weight="bold",
    )
    axes.set(ylabel="test accuracy, %", title="Test accuracy", xlim=(0, None), ylim=(None, 100))


def _norms(axes: Axes, norms: Sequence[Tensor], clip_norm: float) -> None:
    """Overlay the histograms of the run's first and last tenth, on a logarithmic axis: they span decades."""
    tenth = max(1, len(norms) // 10)
    parts = {"first tenth of the steps": norms[:tenth], "last tenth of the steps": norms[-tenth:]}
    logs = {name: (torch.cat(list(part)).double() / clip_norm).log10() for name, part in parts.items()}
    highest = max(1.0, *(values.max().item() for values in logs.values() if len(values)))
    edges = torch.linspace(-_DECADES_BELOW_CLIP_NORM, highest, _BINS + 1, dtype=torch.float64)
    for (name, values), color in zip(logs.items(), (_GREY, _ORANGE), strict=True):
        counts = torch.histogram(values.clamp(min=edges[0].item()), edges).hist
        clipped = (values > 0).double().mean().item()
        label = f"{name}: {clipped:.0%} above"
        axes.stairs(100 * counts / len(values), clip_norm * 10**edges, fill=True, color=color, alpha=0.6, label=label)
    axes.axvline(clip_norm, color=_INK, linestyle="--", linewidth=1.5, label=f"clip norm {clip_norm:g}")
    axes.set(
        xscale="log",
        xlabel="norm of one example's gradient, before clipping",
        ylabel="examples, %",
        title="Gradient norms",
    )
    axes.legend(frameon=False, fontsize=9)
