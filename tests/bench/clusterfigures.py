"""What the cluster bench measures, and its figures: medians, spread, ratios of the two sides."""

from __future__ import annotations

from statistics import median, quantiles

from tests.bench.report import ratio, show

#: What was measured → by whom → its values, a list for each round.
Found = dict[str, dict[str, list[list[float]]]]
Figure = tuple[float, float, float]

#: One value in a round, and its unit.
SCALARS = {
    "nothing there: start to ready": " s",
    "nothing there: start to data path": " s",
    "killed and started: to ready": " s",
    "VmRSS, settled": " MB",
    "VmRSS, killed and started": " MB",
    "VmHWM": " MB",
    "VmHWM of a helper (loader, nft)": " MB",
    "CPU, idle": " ms/s",
    "CPU, storm": " ms/s",
    "kernel threads, storm": " ms/s",
    "changes, storm": "/s",
    "failed connects, single": "",
    "failed connects, restart": "",
    "failed connects, storm": "",
    "programming duration, storm: mean": " s",
    "programming duration, storm: p50": " s",
    "programming duration, storm: p99": " s",
}
#: Many values in a round, in ms.
LATENCIES = tuple(
    f"change {since}, {load}" for load in ("single", "storm") for since in ("sent", "answered")
)


def _percentile(rounds: list[list[float]], percent: int) -> Figure:
    """Of all values, with the lowest and highest that it has in a round; 100 is the maximum."""

    def of(values: list[float]) -> float:
        if percent == 100 or len(values) < 2:
            return max(values)
        return quantiles(values, n=100, method="inclusive")[percent - 1]

    each = [of(values) for values in rounds]
    return of([value for values in rounds for value in values]), min(each), max(each)


def _ratio(arm: list[float], base: list[float]) -> Figure | None:
    """Of the rounds that both have; None if that says nothing."""
    pairs = list(zip(arm, base, strict=False))
    if not pairs or not all(below > 0 for _, below in pairs):
        return None
    return ratio(*map(list, zip(*pairs, strict=True)))


def tell(found: Found, arm: str, base: str) -> dict[str, Figure]:
    """Prints and returns all figures, and `arm` ÷ `base`. The last round may be incomplete."""
    figures: dict[str, Figure] = {}

    def one(label: str, who: str, figure: Figure | None, unit: str = "") -> None:
        if figure:
            figures[f"{label}: {who}"] = figure
            show(f"  {who}", figure, "", unit)

    for label, unit in SCALARS.items():
        print(f"  {label}")
        by = {who: [values[0] for values in rounds] for who, rounds in found[label].items()}
        for who, each in by.items():
            one(label, who, (median(each), min(each), max(each)), unit)
        if unit in (" s", " MB", " ms/s"):
            one(label, f"{arm} ÷ {base}", _ratio(by.get(arm, []), by.get(base, [])))
    for label in LATENCIES:
        by = {who: [median(values) for values in each] for who, each in found[label].items()}
        many = (f"{sum(map(len, rounds))} of {who}" for who, rounds in found[label].items())
        print(f"  {label}: {', '.join(many)}")
        for who, rounds in found[label].items():
            for percent, name in ((50, "p50"), (99, "p99"), (100, "maximum")):
                one(label, f"{who} {name}", _percentile(rounds, percent), " ms")
        if "sent" in label:  # what is measured from the answer may be nothing, or less
            one(label, f"{arm} ÷ {base}, p50", _ratio(by.get(arm, []), by.get(base, [])))
    return figures
