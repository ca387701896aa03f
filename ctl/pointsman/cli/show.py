"""How the reading commands print: kubectl's tables, JSON and YAML, colour only on a terminal."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from pointsman import host
from pointsman.errors import NotRoot, PointsmanError
from pointsman.pins import Pins
from pointsman.view import View

_Command = TypeVar("_Command", bound=Callable[..., Any])
_GAP = "   "
NONE = "<none>"


def output(*formats: str) -> Callable[[_Command], _Command]:
    """-o/--output with these formats, the first of which is the default."""
    return click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="How to print.",
    )


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """What looks into the kernel needs root; what the kernel answers becomes one sentence."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        host.require_root()
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise NotRoot(f"{error}; run as root with CAP_BPF and CAP_SYS_ADMIN") from None
            raise PointsmanError(str(error)) from error

    return run


@contextmanager
def opened(bpffs: Path) -> Iterator[View]:
    """The maps of the current generation. Raises NotLoaded."""
    generation = Pins(bpffs).require_current()
    view = View(generation.maps, generation.packets.maps)
    try:
        yield view
    finally:
        view.close()


def structured(value: Any, form: str) -> str:
    if form == "json":
        return json.dumps(value, indent=2)
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip("\n")


def text_of(value: Any) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value)) or NONE
    return str(value)


def widths(rows: Iterable[Sequence[str]], at_least: Sequence[int] = ()) -> list[int]:
    """The width of each column."""
    found = list(at_least)
    for row in rows:
        found += [0] * (len(row) - len(found))
        for i, cell in enumerate(row):
            found[i] = max(found[i], len(cell))
    return found


def aligned(rows: Iterable[Sequence[str]], columns: Sequence[int], indent: str = "") -> list[str]:
    return [
        (indent + _GAP.join(f"{cell:{w}}" for cell, w in zip(row, columns, strict=True))).rstrip()
        for row in rows
    ]


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], indent: str = "") -> list[str]:
    """Lines with aligned columns, never cut; the first has the headers."""
    cells = [list(headers), *([text_of(value) for value in row] for row in rows)]
    return aligned(cells, widths(cells), indent)


def echo(line: str, style: str = "") -> None:
    """One line; styled on a terminal only, and not there either if NO_COLOR is set."""
    if not style or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        click.echo(line)
        return
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(line, style=style, markup=False)


def note(text: str) -> None:
    """For people, beside what goes to standard output."""
    click.echo(text, err=True)


def bytes_text(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"


def duration_text(seconds: float) -> str:
    """As kubectl's ages: 42s, 3m12s, 5h, 3d4h."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole}s"
    for unit, name, small, small_name in ((60, "m", 1, "s"), (3600, "h", 60, "m")):
        if whole < unit * 60 or (unit == 3600 and whole < 48 * 3600):
            rest = whole % unit // small
            return f"{whole // unit}{name}" + (f"{rest}{small_name}" if rest else "")
    hours = whole % 86400 // 3600
    return f"{whole // 86400}d" + (f"{hours}h" if hours else "")
