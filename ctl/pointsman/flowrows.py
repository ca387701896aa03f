"""Flows as rows that people and scripts read. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pointsman.devices import Timeouts
from pointsman.flows import SECOND, Flow, PortUse, timeout
from pointsman.inspect import UNKNOWN
from pointsman.values import PROTOCOL_NAMES, PortName, endpoint_text, to_text


@dataclass(frozen=True, slots=True)
class FlowRow:
    """One flow. `node` is this node's address and port towards an endpoint on another, "" if the
    endpoint sees the client's own. `halves`: "both", or the one of the two entries that is there.
    Times in seconds."""

    namespace: str
    service: str
    port: str
    protocol: str
    client: str
    vip: str
    endpoint: str
    node: str
    path: str
    state: str
    halves: str
    idle_seconds: float
    expires_seconds: float

    @property
    def full_name(self) -> str:
        """NAMESPACE/SERVICE:PORT"""
        return str(PortName(self.namespace, self.service, self.port)) if self.service else ""


def flow_row(flow: Flow, names: Mapping[int, PortName], timeouts: Timeouts, now: int) -> FlowRow:
    """`now` is CLOCK_MONOTONIC in ns."""
    client, reply = flow.client, flow.reply
    name = names.get(flow.owner, UNKNOWN)
    state = flow.state
    # A packet that came since `now` was read: not in the future.
    idle = max(now - flow.seen, 0) / SECOND
    remote = flow.port_used is not None
    return FlowRow(
        namespace=name.namespace,
        service=name.service,
        port=name.port,
        protocol=_protocol(client.protocol),
        client=endpoint_text(client.source, client.source_port),
        vip=endpoint_text(client.destination, client.destination_port),
        endpoint=endpoint_text(reply.source, reply.source_port),
        node=endpoint_text(reply.destination, reply.destination_port) if remote else "",
        path=flow.path,
        state=state,
        halves=flow.halves,
        idle_seconds=round(idle, 1),
        expires_seconds=round(max(timeout(timeouts, client.protocol, state) - idle, 0.0), 1),
    )


@dataclass(frozen=True, slots=True)
class PortRow:
    """The ports that one address of this node has towards one endpoint."""

    node: str
    endpoint: str
    protocol: str
    used: int
    available: int
    percent: float


def port_rows(used: Counter[PortUse], ports: tuple[int, int]) -> list[PortRow]:
    """Most used first. `ports`: first and last of the range. A client's own port outside of it may
    be among those in use: it is kept where it is free."""
    available = max(0, ports[1] - ports[0] + 1)
    return [
        PortRow(
            node=to_text(use.node),
            endpoint=endpoint_text(use.endpoint, use.port),
            protocol=_protocol(use.protocol),
            used=count,
            available=available,
            percent=round(100 * count / available, 1) if available else 100.0,
        )
        for use, count in sorted(used.items(), key=lambda each: (-each[1], each[0]))
    ]


def _protocol(number: int) -> str:
    return PROTOCOL_NAMES.get(number, str(number))
