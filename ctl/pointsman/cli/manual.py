"""The man page and the shells' completions, made from the commands' own help.

python -m pointsman.cli.manual man|bash|zsh|fish
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

import click
from click.shell_completion import get_completion_class

from pointsman import __version__
from pointsman.cli.main import cli

NAME = "pointsman"


def contexts(
    command: click.Command = cli, parent: click.Context | None = None
) -> Iterator[click.Context]:
    """Of every command, groups before what is in them."""
    name = (NAME if parent is None else command.name) or ""
    settings = {key: value for key, value in command.context_settings.items() if not parent}
    context = click.Context(command, parent, name, **settings)
    yield context
    for each in getattr(command, "commands", {}).values():
        yield from contexts(each, context)


def man() -> str:
    """One page of section 8, in the man(7) macros."""
    lines = [
        f'.TH POINTSMAN 8 "" "pointsman {__version__}" "System Administration"',
        ".nh",
        ".SH NAME",
        f"{NAME} \\- Service load balancer in eBPF",
    ]
    for context in contexts():
        command = context.command
        usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
        lines += (
            [".SH SYNOPSIS", f".B {_escape(usage)}", ".SH DESCRIPTION"]
            if context.parent is None
            else [f".SH {_escape(context.command_path)}", f".B {_escape(usage)}", ".PP"]
        )
        lines += _help(command.help or "")
        for param in command.get_params(context):
            if record := param.get_help_record(context):
                lines += [".TP", f".B {_escape(record[0])}", *_text(record[1])]
    return "\n".join(lines) + "\n"


def completion(shell: str) -> str:
    """The script that a shell reads: it asks pointsman itself."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"{shell} is unknown; write bash, zsh or fish")
    return kind(cli, {}, NAME, f"_{NAME.upper()}_COMPLETE").source()


def _help(text: str) -> Iterator[str]:
    """A docstring: paragraphs, of which click leaves those after a \\b as they are."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield from (".nf", *map(_escape, paragraph.splitlines()[1:]), ".fi", ".PP")
        else:
            yield from (*_text(paragraph), ".PP")


def _text(text: str) -> list[str]:
    return [_escape(" ".join(text.split()))]


def _escape(text: str) -> str:
    """As roff takes it: backslashes and hyphens are what they look like, no line is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text)


if __name__ == "__main__":
    [wanted] = sys.argv[1:]
    sys.stdout.write(man() if wanted == "man" else completion(wanted))
