"""The options of 'up' that decide which Services are served, and how: a Policy."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any

import click

from pointsman.cli import choices
from pointsman.context import Policy

_PRIMARY = "primary"
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def host_name() -> str:
    """As the kubelet names the node if nothing is said."""
    return socket.gethostname().strip().lower()


def _node_name(_context: click.Context, _param: click.Parameter, value: str | None) -> str:
    name = host_name() if value is None else value
    if len(name) > 253 or not _NODE_NAME.fullmatch(name):
        raise click.BadParameter(
            f"{name!r} is no name of a Node (lower case letters, digits, '-', '.'); "
            "write the one that 'kubectl get nodes' shows"
        )
    return name


def _proxy_name(_context: click.Context, _param: click.Parameter, value: str) -> str:
    if value and not _LABEL_VALUE.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no value of a label (63 letters, digits, '-', '_', '.'); "
            "write what the Services' label service.kubernetes.io/service-proxy-name says"
        )
    return value


def _node_port_addresses(
    _context: click.Context, _param: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    texts = [text.strip() for each in value for text in each.split(",") if text.strip()]
    if _PRIMARY in texts:
        if len(set(texts)) > 1:
            raise click.BadParameter(f"{_PRIMARY!r} stands alone; leave the other CIDRs out")
        return (_PRIMARY,)
    return tuple(dict.fromkeys(map(_cidr, texts)))


def _cidr(text: str) -> str:
    mend = f"write e.g. 192.0.2.0/24, or '{_PRIMARY}'"
    if "/" not in text:
        raise click.BadParameter(f"{text!r} is no CIDR; {mend}")
    try:
        # Bits of the host are passed over, as kube-proxy does.
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as error:
        raise click.BadParameter(f"{error}; {mend}") from None


def _port_range(_context: click.Context, _param: click.Parameter, value: str) -> tuple[int, int]:
    return port_range(value, "30000-32767, the API server's --service-node-port-range")


def port_range(value: str, example: str) -> tuple[int, int]:
    """FIRST-LAST as two numbers. Raises click.BadParameter."""
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", value.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise click.BadParameter(
            f"{value!r} is no range of ports; write FIRST-LAST, such as {example}"
        )
    return first, last


OPTIONS = (
    click.option(
        "--service-proxy-name",
        default="",
        metavar="NAME",
        callback=_proxy_name,
        help="Serve the Services whose label service.kubernetes.io/service-proxy-name is this, "
        "and no others.  [default: those without the label]",
    ),
    click.option(
        "--nodeport-addresses",
        multiple=True,
        metavar="CIDR[,CIDR]|primary",
        callback=_node_port_addresses,
        help="Node addresses at which NodePorts answer, e.g. 192.0.2.0/24; 'primary': the Node's "
        "InternalIPs.  [default: all]",
    ),
    click.option(
        "--node-port-range",
        default="30000-32767",
        show_default=True,
        metavar="FIRST-LAST",
        callback=_port_range,
        help="The cluster's NodePorts; a hostPort among them is not served.",
    ),
    click.option(
        "--localhost-nodeports/--no-localhost-nodeports",
        default=True,
        show_default=True,
        help="NodePorts at 127.0.0.1 and ::1 too, for the host's processes.",
    ),
    click.option(
        "--external-ips",
        type=click.Choice(("all", "local", "none")),
        default="all",
        show_default=True,
        help="Which spec.externalIPs are translated; 'local': those of this node. Whoever may "
        "write Services can take any address with them (CVE-2020-8554).",
    ),
    click.option(
        "--refuse-unused-cluster-ips",
        is_flag=True,
        help="Refuse connections to addresses of the service CIDR that no Service has.",
    ),
    click.option(
        "--bind-guard/--no-bind-guard",
        default=True,
        show_default=True,
        help="Processes of the host may not bind to NodePorts and load balancers' ports.",
    ),
    *choices.OPTIONS,
)

node_name = click.option(
    "--node-name",
    envvar="NODE_NAME",
    metavar="NAME",
    callback=_node_name,
    help="This node's name in Kubernetes.  [default: the host name in lower case]",
)


def take(params: dict[str, Any]) -> Policy:
    """The policy that these options say; takes them out of `params`."""
    return Policy(
        proxy_name=params.pop("service_proxy_name"),
        node_port_addresses=params.pop("nodeport_addresses"),
        node_port_range=params.pop("node_port_range"),
        localhost_node_ports=params.pop("localhost_nodeports"),
        external_ips=params.pop("external_ips"),
        refuse_unused_cluster_ips=params.pop("refuse_unused_cluster_ips"),
        bind_guard=params.pop("bind_guard"),
        algorithm=params.pop("algorithm"),
        outlier_ejection=params.pop("outlier_ejection"),
        ejection=choices.take(params),
    )
