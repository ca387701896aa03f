"""The figures of the simulation as PNG and SVG, the same bytes from the same figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from tests.bench.simulation import Result, Row

#: Readable for the colour-blind (Okabe and Ito), and told apart by marks as well.
STYLES: dict[str, dict[str, str]] = {
    "random": {"color": "#555555", "marker": "", "linestyle": "--"},
    "round-robin, in step": {"color": "#D55E00", "marker": "x"},
    "round-robin, apart": {"color": "#E69F00", "marker": "s"},
    "least-connections": {"color": "#0072B2", "marker": "o"},
    "peak-ewma": {"color": "#009E73", "marker": "^"},
    "random, ejection": {"color": "#555555", "marker": "D"},
    "least-connections, ejection": {"color": "#56B4E9", "marker": "v", "linestyle": ":"},
}
USUAL = ("random", "round-robin, apart", "least-connections", "peak-ewma")
#: Of a result, beside that of random choice.
Measure = Callable[["Result", "Result"], float]


def _p99(result: Result, random: Result) -> float:
    return result.p99 / random.p99


def _failed(result: Result, random: Result) -> float:
    return 100 * result.failed


def _panel(
    axes: Any, rows: Sequence[Row], hows: Sequence[str], measure: Measure, label: str, title: str
) -> None:
    """Lines over the number of nodes; one that does not depend on it goes right across."""
    highest = 0.0
    nodes = sorted({row.nodes for row in rows if row.nodes})
    random = next(row.result for row in rows if row.how == "random")
    for how in hows:
        points = [(row.nodes, measure(row.result, random)) for row in rows if row.how == how]
        if points and points[0][0] is None:
            points = [(number, points[0][1]) for number in (nodes[0], nodes[-1])]
        highest = max(highest, *(value for _, value in points))
        axes.plot(*zip(*points, strict=True), label=how, **STYLES[how])
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * highest))
    axes.set_xscale("log")
    axes.set_xticks(nodes, [f"{number:,}" for number in nodes])
    axes.minorticks_off()
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("nodes")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def save(figure: Any, panels: Sequence[Any], directory: Path, name: str) -> None:
    """With one legend below for all panels."""
    told = dict[str, Any]()
    for axes in panels:
        lines, labels = axes.get_legend_handles_labels()
        told |= dict(zip(labels, lines, strict=True))
    figure.legend(told.values(), told.keys(), loc="outside lower center", ncols=4, frameon=False)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / f"{name}.png", dpi=110, metadata={"Software": None})
    figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw(rows: Sequence[Row], directory: Path) -> None:
    """simulation-load: the cases by utilisation. simulation-failed: what goes wrong."""
    matplotlib.rcParams.update({"svg.hashsalt": "pointsman", "svg.fonttype": "none"})
    by: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        by.setdefault((row.case, row.utilisation), []).append(row)
    across = sorted({utilisation for case, utilisation in by if case == "equal"})

    figure, grid = pyplot.subplots(
        3,
        len(across),
        figsize=(3.6 * len(across), 8.5),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    kinds: tuple[tuple[str, str, Measure, str], ...] = (
        ("equal", "all equal", _p99, "p99 ÷ random's"),
        ("tail", "heavy tail", _p99, "p99 ÷ random's"),
        ("slow", "one of ten 10 × slower", _failed, "gave up, %"),
    )
    for line, (case, title, measure, label) in zip(grid, kinds, strict=True):
        for axes, utilisation in zip(line, across, strict=True):
            panel = by[case, utilisation]
            _panel(axes, panel, USUAL, measure, label, f"{title}, {utilisation:.0%} busy")
    save(figure, list(grid.flat), directory, "simulation-load")

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained")
    refusing = ("random", "random, ejection", "least-connections", "least-connections, ejection")
    usual = across[len(across) // 2]
    _panel(panels[0], by["refusing", usual], refusing, _failed, "refused, %", "one of ten refuses")
    panels[0].set_yscale("log")
    panels[0].set_ylim(0.1, 20)
    panels[0].set_yticks((0.1, 1, 10), ("0.1", "1", "10"))
    _panel(panels[1], by["far", usual], USUAL, _p99, "p99 ÷ random's", "one of ten is far")
    turns = ("random", "round-robin, in step", "round-robin, apart")
    _panel(panels[2], by["equal", usual], turns, _failed, "gave up, %", "all equal, rounds in step")
    save(figure, list(panels), directory, "simulation-failed")
