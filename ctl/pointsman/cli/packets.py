"""The options of 'up' about packets from outside: which devices, how they are forwarded."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import click

from pointsman.cli import options, policies
from pointsman.devices import AUTO, Packets, Timeouts

_Command = TypeVar("_Command", bound=Any)
_NONE = "none"
_GLOB = re.compile(r"[^\s/,]{1,64}")
_LONGEST = 10 * 86400  # seconds


def _duration(_context: click.Context, _param: click.Parameter, value: str) -> int:
    return round(options.duration(value, 1, _LONGEST, "30s or 24h"))


def _globs(_context: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    texts = tuple(dict.fromkeys(text.strip() for text in value.split(",") if text.strip()))
    mend = "write names such as eth0 or bond*, separated by commas"
    for text in texts:
        if text in (AUTO, _NONE) and len(texts) > 1:
            raise click.BadParameter(f"{text!r} stands alone; leave the other names out")
        if not _GLOB.fullmatch(text):
            raise click.BadParameter(f"{text!r} is no name of a device; {mend}")
    return () if texts == (_NONE,) else texts


_SNAT_PORTS = "{}-{}".format(*Packets().snat_ports)


def _snat_ports(_context: click.Context, _param: click.Parameter, value: str) -> tuple[int, int]:
    first, last = policies.port_range(value, _SNAT_PORTS)
    if first < 1024:
        raise click.BadParameter(f"{value} has ports of well-known services; take higher ones")
    return first, last


def devices(command: _Command) -> _Command:
    """--devices, as globs: () is none."""
    decorated: _Command = click.option(
        "--devices",
        envvar="POINTSMAN_DEVICES",
        default=AUTO,
        show_default=True,
        metavar="auto|none|NAME[,GLOB]",
        callback=_globs,
        help="Devices on which NodePorts, externalIPs and load balancers' addresses are served to "
        "others; 'auto': with a default route or this Node's address, or towards other nodes.",
    )(command)
    return decorated


OPTIONS = (
    devices,
    click.option(
        "--pod-devices",
        default="",
        metavar="NAME[,GLOB]",
        callback=_globs,
        help="Host's side of pods and guests whose sockets the hooks can't see, e.g. tap*: they "
        "get Services a packet at a time.",
    ),
    click.option(
        "--xdp-mode",
        type=click.Choice(("auto", "native", "generic", "none")),
        default="auto",
        show_default=True,
        help="Where packets are taken: in the driver, or where it can't, at TC ('auto'). "
        "'generic' is slower than TC with most drivers.",
    ),
    click.option(
        "--dispatch",
        type=click.Choice(("snat", "dsr")),
        default="snat",
        show_default=True,
        help="How a client outside reaches an endpoint on another node: from this node's address, "
        "or in a tunnel, with the reply sent straight from there.",
    ),
    click.option(
        "--snat-ports",
        default=_SNAT_PORTS,
        show_default=True,
        metavar="FIRST-LAST",
        callback=_snat_ports,
        help="This node's ports for connections to endpoints on other nodes.",
    ),
    click.option(
        "--conntrack-tcp-timeout-established",
        default="24h",
        show_default=True,
        metavar="DURATION",
        callback=_duration,
        help="How long a silent TCP connection from outside is remembered.",
    ),
    click.option(
        "--conntrack-udp-timeout",
        default="30s",
        show_default=True,
        metavar="DURATION",
        callback=_duration,
        help="The same of UDP that was not answered,",
    ),
    click.option(
        "--conntrack-udp-timeout-stream",
        default="120s",
        show_default=True,
        metavar="DURATION",
        callback=_duration,
        help="and of UDP that was.",
    ),
)


def take(params: dict[str, Any]) -> Packets:
    """What these options say; takes them out of `params`."""
    return Packets(
        devices=params.pop("devices"),
        pod_devices=params.pop("pod_devices"),
        xdp_mode=params.pop("xdp_mode"),
        dsr=params.pop("dispatch") == "dsr",
        snat_ports=params.pop("snat_ports"),
        timeouts=Timeouts(
            tcp_open=params.pop("conntrack_tcp_timeout_established"),
            udp_new=params.pop("conntrack_udp_timeout"),
            udp_open=params.pop("conntrack_udp_timeout_stream"),
        ),
    )
