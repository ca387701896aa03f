"""What a shell completes beside commands and options: resources, and names as the maps have them.

Whoever presses TAB wants no error: without root, or with nothing loaded, there is nothing to offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import click

from pointsman.cli import show
from pointsman.errors import PointsmanError
from pointsman.inspect import is_service
from pointsman.view import View

_T = TypeVar("_T")


def names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Of Services."""
    return suggest(_services(ctx), ctx.params.get("namespace"), incomplete)


def full_names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Of Services, as NAMESPACE/NAME."""
    return _starting(incomplete, map("/".join, _services(ctx)))


def namespaces(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    return _starting(incomplete, (namespace for namespace, _ in _services(ctx)))


def maps(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    return _starting(incomplete, _look(ctx, lambda view: view.names_of_maps))


def suggest(
    services: Iterable[tuple[str, str]], namespace: str | None, incomplete: str
) -> list[str]:
    """Names of the namespace, or of all; NAMESPACE/NAME where no name begins as what is there."""
    known = [each for each in services if namespace in (None, each[0])]
    return _starting(incomplete, (name for _, name in known)) or _starting(
        incomplete, map("/".join, known)
    )


def _starting(incomplete: str, words: Iterable[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)})


def _services(ctx: click.Context) -> list[tuple[str, str]]:
    return _look(ctx, lambda view: [each[:2] for each in view.names().values() if is_service(each)])


def _look(ctx: click.Context, read: Callable[[View], list[_T]]) -> list[_T]:
    bpffs = ctx.params.get("bpffs")
    try:
        with show.opened(bpffs if isinstance(bpffs, Path) else Path()) as view:
            return read(view)
    except (PointsmanError, OSError):
        return []
