"""Ratios of interleaved arms, with medians and spread."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def ratio(arm: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest) of arm ÷ base over the parts of one run."""
    each = [a / b for a, b in zip(arm, base, strict=True)]
    return median(each), min(each), max(each)


def show(label: str, figure: tuple[float, float, float], bar: str = "", unit: str = "") -> None:
    middle, low, high = figure
    bar = f"   bar {bar}" if bar else ""
    print(f"  {label:<52} {middle:8.3f}{unit} ({low:.3f} … {high:.3f}){bar}", flush=True)
