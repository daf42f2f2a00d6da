"""Figures 1, 2 and 3 of Rochette et al. 2019: the time of a batch against the channel rate, and the batch size.

    python benchmarks/figures.py [--scale smoke|cpu|full] [--only figure1 figure2 figure3]

writes JSON and a picture for each. At scale `full` the images and batches are the paper's; `cpu` has smaller images.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import plotting
import runner
import toy
from pegrad.strategies import STRATEGIES
from runner import Effort, Results

EFFORTS = {
    "smoke": Effort(rounds=1),
    "cpu": Effort(rounds=3),
    "full": Effort(rounds=20),
}
IMAGE_SIZES = {"smoke": 16, "cpu": 32, "full": 256}
CHANNELS = {"smoke": 2, "cpu": 25, "full": 25}
WIDE_CHANNELS = {"smoke": 4, "cpu": 64, "full": 256}
RATES = {2: (1, 2, 4, 8, 16), 3: (1, 2, 3, 4, 5), 4: (1, 1.75, 2.5, 3.25, 4)}
BATCH_SIZES = {"smoke": (1, 2), "cpu": (1, 2, 4, 8, 16), "full": (1, 2, 4, 8, 12, 16)}


class Curve(NamedTuple):
    """One panel: what varies along its axis, and the points there."""

    axis: str
    sizes: Mapping[float, tuple[Mapping[str, Any], int]]
    """By place on the axis: arguments of the network, and the batch size."""


def panels(figure: str, scale: str) -> dict[str, Curve]:
    """List the panels of a figure at a scale, by title."""
    image = {"image_size": IMAGE_SIZES[scale]}
    if figure == "figure2":
        net = image | {"layers": 3, "kernel_size": 5, "channels": WIDE_CHANNELS[scale]}
        return {"3 layers": Curve("batch size", {size: (net, size) for size in BATCH_SIZES[scale]})}
    net = image | {"kernel_size": {"figure1": 3, "figure3": 5}[figure], "channels": CHANNELS[scale]}
    return {
        f"{layers} layers": Curve("channel rate", {rate: (net | {"layers": layers, "rate": rate}, 8) for rate in rates})
        for layers, rates in RATES.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw."""
    parser = runner.parser("Runtime figures of Rochette et al. 2019.", EFFORTS)
    figures = "figure1", "figure2", "figure3"
    parser.add_argument("--only", nargs="+", choices=figures, default=figures, help="these figures; all")
    options = runner.parse(parser, argv)
    for figure in options.only:
        draw(figure, options)


def draw(figure: str, options: Any) -> None:
    """Measure and draw one figure."""
    stem = options.out / f"{figure}_{options.scale}_{options.device}"
    size, rounds = IMAGE_SIZES[options.scale], options.effort.rounds
    settings = {"image_size": size, "rounds": rounds, "allocator": options.allocator}
    results = Results(stem.with_suffix(".json"), settings, options.device, fresh=options.fresh)
    strategies = toy.STRATEGIES_OF_FIGURES
    if figure == "figure2":
        strategies = {"naive": STRATEGIES["naive"], **strategies}
    wanted = panels(figure, options.scale)
    points = {
        f"{title}/{at}": partial(toy.measure, *where, strategies, options.effort, options.device)
        for title, curve in wanted.items()
        for at, where in curve.sizes.items()
    }
    runner.run(points, results)
    lines = {
        title: (
            curve.axis,
            {
                name: [(at, results[f"{title}/{at}"]["seconds"][name]) for at in curve.sizes]
                for name in (toy.BASELINE, *strategies)
            },
        )
        for title, curve in wanted.items()
    }
    note = f"images 3×{size}×{size}, medians of {rounds} rounds; {results.where()}"
    title = {"figure1": "k = 3", "figure2": "k = 5, batch size", "figure3": "k = 5"}[figure]
    plotting.runtime_lines(lines, f"Clipped gradient of a batch, {title}", note).savefig(stem.with_suffix(".png"))
    print(f"{stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
