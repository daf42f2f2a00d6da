"""Fit the constants of `pegrad.rules.costs`: time every kernel over a range of shapes, then robust least squares.

    python benchmarks/fit_costs.py [--out benchmarks/results]

prints the table to put into `src/pegrad/rules/costs.py` and writes the measurements to `fit_costs.json`.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import least_squares
from tqdm import tqdm

from pegrad.numerics import contract, squared_norms
from pegrad.rules.conv.geometry import Geometry
from pegrad.rules.conv.site import ConvWeight
from pegrad.rules.costs import Rates, Work
from pegrad.rules.linear import LinearWeight
from pegrad.rules.site import Kernel, Site

CONVOLUTIONS = [  # batch, C, D, size, kernel, stride
    (128, 3, 64, 32, 3, 1), (64, 16, 64, 32, 3, 1), (64, 64, 64, 32, 3, 1), (128, 64, 128, 16, 3, 1),
    (64, 128, 128, 16, 3, 1), (64, 64, 128, 32, 3, 2), (64, 128, 256, 16, 3, 2), (128, 128, 256, 8, 3, 1),
    (64, 256, 256, 8, 3, 1), (128, 256, 512, 4, 3, 1), (64, 512, 512, 4, 3, 1), (128, 512, 512, 2, 3, 1),
    (16, 64, 64, 32, 3, 1), (16, 128, 128, 16, 3, 1), (16, 128, 256, 8, 3, 1), (64, 64, 128, 32, 1, 2),
    (64, 256, 512, 8, 1, 2), (8, 3, 64, 112, 7, 2), (8, 3, 64, 112, 3, 1), (4, 64, 128, 56, 3, 1),
    (64, 3, 192, 32, 4, 4), (16, 64, 192, 27, 5, 1), (16, 192, 384, 13, 3, 1), (16, 384, 256, 13, 3, 1),
]  # fmt: skip
LINEAR = [  # batch, T, D, p
    (64, 1, 512, 10), (64, 1, 4096, 1024), (16, 65, 192, 576), (64, 65, 192, 192), (16, 65, 192, 768),
    (16, 65, 768, 192), (8, 197, 384, 384), (4, 512, 256, 256), (16, 17, 512, 512),
]  # fmt: skip
_MUCH = 1e10


def sites() -> list[tuple[Site, torch.Tensor, torch.Tensor]]:
    """Make every site with an input and an output gradient."""
    made: list[tuple[Site, torch.Tensor, torch.Tensor]] = []
    for batch, c, d, size, k, s in CONVOLUTIONS:
        geometry = Geometry((k, k), (s, s), (k // 2 if k != 4 else 0,) * 2, (1, 1), 1)
        x = torch.randn(batch, c, size, size)
        g = torch.randn(batch, d, *geometry.output_size((size, size)))
        made.append((ConvWeight(torch.empty(d, c, k, k), "conv2d", geometry), x, g))
    for batch, t, d, p in LINEAR:
        made.append((LinearWeight(torch.empty(p, d), "linear"), torch.randn(batch, t, d), torch.randn(batch, t, p)))
    return made


def best_time(run: Callable[[], object], seconds: float) -> float:
    """Nanoseconds of the fastest run within a budget: other work on the machine can only add."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e9


def measure(seconds: float) -> dict[str, list[tuple[Work, float]]]:
    """Time every kernel at every site, by the name of its rates."""
    found: dict[str, list[tuple[Work, float]]] = defaultdict(list)
    for site, x, g in tqdm(sites(), desc="sites"):
        shapes = tuple(x.shape), tuple(g.shape)
        kernels: list[Kernel] = [*site.stacking(*shapes).values(), *site.norming(*shapes).values()]
        native = site.summing(*shapes)
        for kernel in [*kernels, *([native] if native else [])]:
            work = kernel.work
            if work.multiply_adds + 50 * work.moved + 100 * work.written < _MUCH:  # what costs more is never chosen
                found[kernel.rates].append((work, best_time(partial(kernel.run, x, g), seconds)))
        rows = torch.randn(x.shape[0], *site.source.shape)
        moved = Work(0, moved=rows.numel())
        found["reduce"].append((moved, best_time(partial(squared_norms, rows), seconds)))
        found["contract"].append(
            (moved, best_time(partial(contract, torch.rand(x.shape[0]), rows, None, rows.dtype), seconds))
        )
    return found


def fit(points: list[tuple[Work, float]]) -> tuple[Rates, float]:
    """Fit rates >= 0 to the logarithms of the times, with few outliers in mind; also the median relative error."""
    work, times = np.array([w for w, _ in points]), np.array([t for _, t in points])
    start = times.sum() / np.maximum(work.sum(0), 1) / work.shape[1]
    start = np.where(work.any(0), start, 0)

    def errors(scale: np.ndarray) -> np.ndarray:
        return np.log(work @ (scale * start) / times)

    found = least_squares(errors, np.ones(work.shape[1]), bounds=(0, np.inf), loss="soft_l1", f_scale=0.1)
    rates = found.x * start
    error = np.median(np.abs(work @ rates / times - 1))
    return Rates(*(float(f"{rate:.2g}") if rate > 1e-4 else 0.0 for rate in rates)), float(error)


def main() -> None:
    """Measure, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.15, help="budget for each kernel at each site")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    found = measure(options.seconds)
    result = {}
    for name, points in found.items():
        rates, error = fit(points)
        result[name] = {"rates": rates, "median relative error": round(error, 2), "points": points}
        print(f'    "{name}": Rates{tuple(rates)},  # median relative error {error:.0%}')
    settings = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": options.seconds,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fit_costs.json").write_text(json.dumps({"settings": settings, "kernels": result}, indent=1))


if __name__ == "__main__":
    main()
