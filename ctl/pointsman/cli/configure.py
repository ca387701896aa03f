"""The option --config of 'up', and 'pointsman config check': what a configuration file would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from pointsman.cli import choices, show
from pointsman.config import files, mounted
from pointsman.config.configuration import BadConfiguration, Configuration
from pointsman.events import Problem

_Command = TypeVar("_Command", bound=Any)
_PROBLEMS = "pointsman.configuration"


class BadFile(click.BadParameter):
    """The file can't be read or must not enter; `problems` say why, one line each."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n  ".join(map(str, problems)))
        self.problems = problems


def option(command: _Command) -> _Command:
    """--config, read before all other options: it becomes their defaults.

    So the order is command line, environment, file, default; the parameter is called `config`.
    Whatever is wrong with the file is raised as BadFile.
    """
    decorated: _Command = click.option(
        "--config",
        envvar="POINTSMAN_CONFIG",
        type=click.Path(path_type=Path),
        metavar="FILE|DIRECTORY",
        is_eager=True,
        callback=_configure,
        help="A PointsmanConfiguration, kube-proxy's own file, or a ConfigMap that has one; a "
        "directory where one is mounted. Watched for changes. Other options win over it.",
    )(command)
    return decorated


def problems(context: click.Context) -> tuple[Problem, ...]:
    """The warnings about the file that this context was parsed with."""
    found: tuple[Problem, ...] = context.meta.get(_PROBLEMS, ())
    return found


def _configure(context: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    if value is None or context.resilient_parsing:
        return value
    _, configuration = _read(value, context.command)
    if _PROBLEMS not in context.meta:  # later the agent tells of them
        for problem in configuration.problems:
            show.note(f"warning: {problem}")
    context.meta[_PROBLEMS] = configuration.problems
    context.default_map = {**(context.default_map or {}), **configuration.options}
    return value


def _read(path: Path, command: click.Command) -> tuple[Path, Configuration]:
    """The file and its meaning. Raises BadFile."""
    try:
        file, data = mounted.load(path)
        configuration = files.read(data, str(file))
        if faults := _faults(configuration, command):
            raise BadConfiguration(*(replace(each, where=str(file)) for each in faults))
    except BadConfiguration as bad:
        raise BadFile(bad.problems) from None
    return file, configuration


def _faults(configuration: Configuration, command: click.Command) -> list[Problem]:
    """What the options themselves have against the values."""
    found = []
    context = click.Context(command, info_name=command.name)
    params = {param.name: param for param in command.params}
    for name, value in configuration.options.items():
        try:
            _typed(context, params[name], value)
        except click.BadParameter as error:
            message, _, mend = error.message.rstrip(".").rpartition("; ")
            if not message:
                message, mend = mend, "write another value"
            found.append(Problem(message, mend, field=configuration.fields[name]))
    return found


def _typed(context: click.Context, param: click.Parameter, value: Any) -> Any:
    """What a command gets of it. Raises click.BadParameter."""
    typed = param.type_cast_value(context, value)
    return param.callback(context, param, typed) if param.callback else typed


def _together(configuration: Configuration, command: click.Command) -> None:
    """What no option has anything against by itself, on a command line that says nothing else.
    Raises click.UsageError."""
    context, options = click.Context(command, info_name=command.name), configuration.options
    choices.take(
        {
            name: _typed(context, param, options.get(name, param.get_default(context)))
            for param in command.params
            if (name := str(param.name)).startswith("ejection_")
        }
    )


@click.group("config")
def config() -> None:
    """Look at configuration files."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE|DIRECTORY")
@click.option("--strict", is_flag=True, help="Exit with 1 if there are warnings.")
@show.output("table", "json", "yaml")
@click.pass_context
def check(context: click.Context, file: Path, strict: bool, form: str) -> None:
    """Say what 'up --config' would make of a file. Changes nothing, and needs no root.

    FILE is a PointsmanConfiguration, kube-proxy's KubeProxyConfiguration, or a ConfigMap that has
    one of them. Warnings go to standard error. The exit code is 2 if the file is bad.

    \b
    Examples:
        pointsman config check /etc/pointsman/config
        kubectl -n kube-system get configmap kube-proxy -o yaml > kube-proxy.yaml
        pointsman config check --strict kube-proxy.yaml
    """
    from pointsman.cli.up import up  # which has our option

    found, configuration = _read(file, up)
    _together(configuration, up)
    params = {param.name: param for param in up.params}
    rows = [
        (_flag(params[name], value), value, configuration.fields[name])
        for name, value in configuration.options.items()
    ]
    if form == "table":
        click.echo(f"{found}: {configuration.kind}")
        for line in show.table(["OPTION", "VALUE", "FROM"], rows):
            click.echo(line)
        if configuration.notes:
            click.echo()
            notes = [(note.field, note.why) for note in configuration.notes]
            for line in show.table(["NEEDS NOTHING", "BECAUSE"], notes):
                click.echo(line)
    else:
        click.echo(show.structured(_plain(str(found), configuration, rows), form))
    for problem in configuration.problems:
        show.note(f"warning: {problem}")
    if strict and configuration.problems:
        context.exit(1)


def _flag(param: click.Parameter, value: object) -> str:
    """The option as it is written on the command line."""
    return max((value is False and param.secondary_opts) or param.opts, key=len)


def _plain(
    file: str, configuration: Configuration, rows: list[tuple[str, object, str]]
) -> dict[str, Any]:
    return {
        "file": file,
        "kind": configuration.kind,
        "options": [
            {"option": option, "value": value, "from": field} for option, value, field in rows
        ],
        "needsNothing": [
            {"field": note.field, "because": note.why} for note in configuration.notes
        ],
        "warnings": [
            {
                "object": each.object,
                "field": each.field,
                "message": each.message,
                "mend": each.mend,
            }
            for each in configuration.problems
        ],
    }
