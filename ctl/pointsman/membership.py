"""Which endpoints a frontend has, whatever its policies: what sockets are judged by. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from pointsman.context import Context
from pointsman.nodes import LOOPBACK_IPV6
from pointsman.objects import EndpointSlice, Ref
from pointsman.topology import present, serving
from pointsman.tracker import Tracker
from pointsman.values import (
    PROTOCOL_NAMES,
    Address,
    Backend,
    Frontend,
    PortName,
    is_ipv4,
    to_address,
)
from pointsman.wanted import resolve_ref

_Members = Callable[[Iterable[EndpointSlice], str, str, str], frozenset[Backend]]


def _present(
    slices: Iterable[EndpointSlice], family: str, _port_name: str, protocol: str
) -> frozenset[Backend]:
    return present(slices, family, protocol)


class Membership:
    """`owner` says which object and service port a frontend belongs to in the maps."""

    def __init__(
        self,
        tracker: Tracker,
        context: Context,
        owner: Callable[[Frontend], tuple[Ref, PortName] | None],
    ) -> None:
        self._tracker = tracker
        self._context = context
        self._owner = owner

    def present(self, frontend: Frontend) -> frozenset[Backend] | None:
        """All endpoints of that Service, family and protocol; None if the frontend is nobody's.

        By the number of their port, not its name: when a port is renamed, the Service says so
        before its EndpointSlices do.
        """
        found = self._owner(frontend) or self._owner(frontend.node_port)
        return found and self._members(frontend, *found, _present)

    def serving(self, frontend: Frontend) -> frozenset[Backend] | None:
        """The endpoints of that service port that may keep their flows."""
        found = self._owner(frontend)
        if found is None and self._is_node(frontend.address):
            found = self._owner(frontend.node_port)
        return found and self._members(frontend, *found, serving)

    @cached_property
    def _addresses(self) -> frozenset[Address]:
        tracker = self._tracker
        texts = {
            endpoint.addresses[0]
            for ref in tracker.services
            for piece in tracker.slices(ref)
            for endpoint in piece.endpoints or ()
            if endpoint.addresses
        }
        for pod in tracker.pods.values():
            texts.update(ip.ip for ip in pod.status.pod_ips)
            texts.add(pod.status.pod_ip)
        return frozenset(to_address(text) for text in texts if text)

    def exists(self, address: Address) -> bool:
        """Whether any endpoint or pod has it."""
        return address in self._addresses

    def _is_node(self, address: Address) -> bool:
        context = self._context
        return (
            address == LOOPBACK_IPV6
            or (is_ipv4(address) and address[12] == 127)
            or address in context.local_addresses
            or address in context.remote_addresses
            or address in context.own_addresses
        )

    def _members(
        self, frontend: Frontend, ref: Ref, name: PortName, members: _Members
    ) -> frozenset[Backend]:
        if ref.kind == "Service":
            family = "IPv4" if is_ipv4(frontend.address) else "IPv6"
            protocol = PROTOCOL_NAMES[frontend.protocol]
            return members(self._tracker.slices(ref), family, name.port, protocol)
        entries, _ = resolve_ref(ref, self._tracker, self._context)
        return frozenset(
            backend for entry in entries if entry.owner == name for backend in entry.endpoints
        )
