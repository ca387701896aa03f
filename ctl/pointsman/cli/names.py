"""Arguments that several reading commands take: resources, names, namespaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pointsman.cli import complete
from pointsman.cli.resources import BY_NAME, RESOURCES, Resource

_Command = TypeVar("_Command", bound=Callable[..., Any])


def resource(*names: str) -> Callable[[_Command], _Command]:
    """RESOURCE: one of these, also by the aliases that kubectl's users type."""

    def convert(_context: click.Context, _param: click.Parameter, value: str) -> Resource:
        found = BY_NAME.get(value.lower())
        if found is None or found.name not in names:
            known = "; ".join(
                f"{each.name} ({', '.join(each.aliases)})"
                for each in RESOURCES
                if each.name in names
            )
            raise click.BadParameter(f"{value!r} is not one of: {known}")
        return found

    def offered(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete.lower())]

    return click.argument("resource", callback=convert, shell_complete=offered)


namespace = click.option(
    "-n",
    "--namespace",
    metavar="NAMESPACE",
    shell_complete=complete.namespaces,
    help="Only this namespace.  [default: all]",
)


def split(name: str, given: str | None) -> tuple[str | None, str]:
    """NS/NAME, or NAME with -n: (namespace, name). Raises click.UsageError."""
    if "/" not in name:
        return given, name
    first, _, rest = name.partition("/")
    if given not in (None, first):
        raise click.UsageError(f"{name} names namespace {first}, but -n says {given}")
    return first, rest
