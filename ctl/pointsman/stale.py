"""Which sockets and conntrack entries still lead to an endpoint that has left. Pure.

Sockets and flows are not judged by the same sets: a socket stays as long as its endpoint is in the
Service at all, a terminating one too (KEP-1669); a flow goes when its endpoint no longer serves
(kube-proxy, pkg/proxy/conntrack/cleanup.go). Neither looks at topology or traffic policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from pointsman.values import UDP, Address, Backend, Frontend


class Record(NamedTuple):
    """One socket whose connect was translated, as struct socket of bpf/abi.h has it."""

    cookie: int
    protocol: int
    vip: Backend  # as the program dialled it: a NodePort has the node's address here
    peer: Backend
    endpoint: int = 0
    generation: int = 0


class Flow(NamedTuple):
    """One UDP conntrack entry: where the first packet came from and went to, and who answers."""

    source: Backend
    vip: Backend
    peer: Backend
    ident: int = 0
    zone: int = 0


#: The endpoints of a frontend; None if no Service has it.
Endpoints = Callable[[Frontend], frozenset[Backend] | None]


def stale(
    records: Iterable[Record], endpoints: Endpoints, exists: Callable[[Address], bool]
) -> list[Record]:
    """The records whose peer is no endpoint any more of what they dialled.

    `endpoints`: all of the Service port's, in whatever condition. Where nobody has the VIP any
    more, those sockets are stale whose peer's address is no endpoint's or pod's at all: a Service
    that is no NodePort now, or another proxy's, takes nothing from what is connected.
    """
    ask = _cached(endpoints)
    found = []
    for record in records:
        members = ask(Frontend(*record.vip, record.protocol))
        if members is None:
            if not exists(record.peer[0]):
                found.append(record)
        elif record.peer not in members:
            found.append(record)
    return found


def of_services(flows: Iterable[Flow], serving: Endpoints) -> list[Flow]:
    """The flows to a Service's address: some proxy translated them."""
    ask = _cached(serving)
    return [flow for flow in flows if ask(Frontend(*flow.vip, UDP)) is not None]


def stale_flows(flows: Iterable[Flow], serving: Endpoints) -> list[Flow]:
    """The flows to a Service that are answered by none of its serving endpoints.

    What is no Service's is left alone, and so is a Service without a serving endpoint: there is
    nowhere else for the flow to go.
    """
    ask = _cached(serving)
    found = []
    for flow in flows:
        left = ask(Frontend(*flow.vip, UDP))
        if left and flow.peer not in left:
            found.append(flow)
    return found


def _cached(endpoints: Endpoints) -> Endpoints:
    """Thousands of sockets dial few frontends."""
    known: dict[Frontend, frozenset[Backend] | None] = {}

    def ask(frontend: Frontend) -> frozenset[Backend] | None:
        if frontend not in known:
            known[frontend] = endpoints(frontend)
        return known[frontend]

    return ask
