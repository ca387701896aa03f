"""The figures of the bench of choosing as PNG and SVG, the same bytes from the same figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib import pyplot

from tests.bench.choosingcases import CASES
from tests.bench.choosingfigures import Found, Result
from tests.bench.simulationplots import save

#: As in simulationplots.py: readable for the colour-blind, and told apart by marks as well.
_PERCENTILES: tuple[tuple[str, Callable[[Result], float], dict[str, str]], ...] = (
    ("p50", lambda r: r.p50, {"color": "#009E73", "marker": "o"}),
    ("p99", lambda r: r.p99, {"color": "#0072B2", "marker": "s"}),
    ("p99.9", lambda r: r.p999, {"color": "#D55E00", "marker": "D"}),
)


def _latency(axes: Any, arms: dict[str, list[Result]], title: str) -> None:
    """A line for each arm, from its p50 to its p99.9; small marks are single rounds."""
    for place, results in enumerate(arms.values()):
        low, *_, high = (median(map(of, results)) for _, of, _ in _PERCENTILES)
        axes.plot((low, high), (place, place), color="#999999", linewidth=1, zorder=1)
        for label, of, style in _PERCENTILES:
            values = list(map(of, results))
            axes.scatter(values, [place] * len(values), s=5, alpha=0.4, **style)
            axes.scatter(median(values), place, s=30, label="" if place else label, **style)
    axes.set_xscale("log")
    ticks = (20, 50, 100, 200, 500, 1500)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlim(15, 1900)
    axes.set_xlabel("ms")
    _name(axes, list(arms), title)


def _lengths(
    axes: Any, arms: dict[str, list[Result]], of: Callable[[Result], float], title: str, label: str
) -> None:
    """A bar for each arm: the median, and a mark for each round."""
    for place, results in enumerate(arms.values()):
        values = [of(r) for r in results]
        axes.barh(place, median(values), color="#56B4E9", zorder=1)
        axes.scatter(values, [place] * len(values), s=8, color="#333333", zorder=2)
    axes.set_xlabel(label)
    _name(axes, list(arms), title)


def _name(axes: Any, arms: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(arms)), arms, fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize="medium")


def draw(found: Found, directory: Path) -> None:
    """choosing-latency: how long requests take. choosing-failed: what fails, and who gets more."""
    matplotlib.rcParams.update({"svg.hashsalt": "pointsman", "svg.fonttype": "none"})
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axes, case in zip(grid.flat, ("equal", "slow", "dropping", "far"), strict=True):
        _latency(axes, found[case], CASES[case].title)
    save(figure, list(grid.flat), directory, "choosing-latency")

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axes, case in zip(grid.flat, ("refusing", "dropping", "rolling"), strict=False):
        failed = "failed connects, %"
        _lengths(axes, found[case], lambda r: 100 * r.failed / r.asked, CASES[case].title, failed)
    fairness = "connections of an endpoint, max ÷ mean"
    _lengths(grid[1, 1], found["stay"], lambda r: r.fairness or 0, CASES["stay"].title, fairness)
    save(figure, list(grid.flat), directory, "choosing-failed")
