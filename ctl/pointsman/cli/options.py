"""Options that several commands share, each defined once."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from pointsman.config.typed import seconds
from pointsman.generations import Sizes

_Command = TypeVar("_Command", bound=Callable[..., Any])


def bpffs(command: _Command) -> _Command:
    return click.option(
        "--bpffs",
        envvar="POINTSMAN_BPFFS",
        type=click.Path(path_type=Path),
        default=Path("/sys/fs/bpf/pointsman"),
        show_default=True,
        help="Where programs, maps and links are pinned.",
    )(command)


def run_dir(command: _Command) -> _Command:
    return click.option(
        "--run-dir",
        envvar="POINTSMAN_RUN_DIR",
        type=click.Path(path_type=Path),
        default=Path("/run/pointsman"),
        show_default=True,
        help="Where the agent keeps its lock and status file.",
    )(command)


def sizes(command: _Command) -> _Command:
    """--max-services and its like as ints of those names."""
    for name, default, text in (
        ("maglev-lines", 32768, "Lines of Maglev tables, 64 bytes each; ten endpoints take 32."),
        ("flows", 262144, "Halves of connections from outside: each takes two."),
        ("endpoints", 65536, "Endpoints of all Services together."),
        ("slots", 131072, "Slots: the sum of all sets of endpoints, twice during a change."),
        ("services", 65536, "Frontends: a VIP takes one for each port and one more."),
    ):
        command = click.option(
            f"--max-{name}",
            type=click.IntRange(16, 1 << (24 if name == "flows" else 20)),
            default=default,
            show_default=True,
            help=text,
        )(command)
    return command


def sizes_of(params: Mapping[str, Any]) -> Sizes:
    """What the options of `sizes` say."""
    return Sizes(
        services=params["max_services"],
        slots=params["max_slots"],
        endpoints=params["max_endpoints"],
        lines=params["max_maglev_lines"],
        flows=params["max_flows"],
    )


def duration(text: str, least: int, most: int, example: str) -> float:
    """Seconds of a duration as Go writes it. Raises click.BadParameter."""
    try:
        found = seconds(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; write one such as {example}") from None
    if not least <= found <= most:
        limit = f"{most // 3600}h" if most >= 3600 else f"{most}s"
        raise click.BadParameter(f"{text} is out of range; write {least}s to {limit}")
    return found


def address(text: str, default_port: int) -> tuple[str, int]:
    """ADDR, ADDR:PORT or [ADDR]:PORT. Raises click.BadParameter."""
    host_part, port = text, default_port
    if text.startswith("["):
        host_part, _, rest = text[1:].partition("]")
        port_text = rest.removeprefix(":")
    elif text.count(":") == 1:
        host_part, _, port_text = text.partition(":")
    else:
        port_text = ""
    try:
        if port_text:
            port = int(port_text)
        if not 0 <= port <= 65535:
            raise ValueError
        return str(ipaddress.ip_address(host_part)), port
    except ValueError:
        raise click.BadParameter(f"{text!r} is no ADDRESS[:PORT], such as 127.0.0.1:53") from None
