"""The options of 'up' about how endpoints are chosen: what Services get that say nothing."""

from __future__ import annotations

from typing import Any

import click

from pointsman.choice import ALGORITHMS, EJECTIONS
from pointsman.cli import options
from pointsman.context import Ejection

_USUAL = Ejection()
_LONGEST = 86400  # seconds


def _duration(_context: click.Context, _param: click.Parameter, value: str) -> float:
    return options.duration(value, 1, _LONGEST, "10s or 5m")


def _number(name: str, default: int, least: int, most: int, text: str) -> Any:
    return click.option(
        f"--ejection-{name}",
        type=click.IntRange(least, most),
        default=default,
        show_default=True,
        help=text,
    )


def _time(name: str, default: float, text: str) -> Any:
    return click.option(
        f"--ejection-{name}",
        default=f"{default:g}s",
        show_default=True,
        metavar="DURATION",
        callback=_duration,
        help=text,
    )


OPTIONS = (
    click.option(
        "--algorithm",
        type=click.Choice(tuple(ALGORITHMS)),
        default="random",
        show_default=True,
        help="How Services without the annotation pointsman.io/algorithm choose an endpoint.",
    ),
    click.option(
        "--outlier-ejection",
        type=click.Choice(EJECTIONS),
        default="off",
        show_default=True,
        help="Whether endpoints whose connects fail are passed over for a while, at Services "
        "without the annotation pointsman.io/outlier-ejection; 'observe' only counts.",
    ),
    _number(
        "consecutive-failures", _USUAL.consecutive_failures, 0, 1000,
        "Connects that fail in a row until an endpoint is ejected; 0: however many.",
    ),
    _number(
        "failure-percent", _USUAL.failure_percent, 0, 100,
        "Of the connects of late, the failures that eject an endpoint; 0: however many,",
    ),
    _number(
        "minimum-connects", _USUAL.minimum_connects, 1, 500,
        "if there were so many connects.",
    ),
    _time("shortest", _USUAL.shortest, "Time of the first ejection, doubled for each further one"),
    _time("longest", _USUAL.longest, "up to this."),
    _number(
        "most-percent", _USUAL.most_percent, 1, 99,
        "Share of a Service port's endpoints that may be ejected at a time.",
    ),
    _time("trial", _USUAL.trial, "Time that a connection has to show that an endpoint is back."),
)  # fmt: skip


def take(params: dict[str, Any]) -> Ejection:
    """What these options say; takes them out of `params`. Raises click.UsageError."""
    found = Ejection(
        consecutive_failures=params.pop("ejection_consecutive_failures"),
        failure_percent=params.pop("ejection_failure_percent"),
        minimum_connects=params.pop("ejection_minimum_connects"),
        shortest=params.pop("ejection_shortest"),
        longest=params.pop("ejection_longest"),
        most_percent=params.pop("ejection_most_percent"),
        trial=params.pop("ejection_trial"),
    )
    if found.shortest > found.longest:
        raise click.UsageError(
            f"--ejection-shortest {found.shortest:g}s is longer than --ejection-longest "
            f"{found.longest:g}s: write a smaller one"
        )
    return found
