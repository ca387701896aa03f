"""Which endpoints a frontend has, whatever its policies: what sockets are judged by. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pointsman.context import Context
from pointsman.objects import EndpointSlice, Ref
from pointsman.topology import present, serving
from pointsman.tracker import Tracker
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOL_NAMES,
    Backend,
    Frontend,
    PortName,
    is_ipv4,
)
from pointsman.wanted import resolve_ref

_Members = Callable[[Iterable[EndpointSlice], str, str, str], frozenset[Backend]]


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
        """All endpoints of that service port and family; None if the frontend is nobody's."""
        return self._members(frontend, present)

    def serving(self, frontend: Frontend) -> frozenset[Backend] | None:
        """Those of them that may keep their flows."""
        return self._members(frontend, serving)

    def _members(self, frontend: Frontend, members: _Members) -> frozenset[Backend] | None:
        ipv4 = is_ipv4(frontend.address)
        found = self._owner(frontend) or self._owner(
            frontend._replace(address=ANY_IPV4 if ipv4 else ANY_IPV6)
        )
        if found is None:
            return None
        ref, name = found
        if ref.kind == "Service":
            family, protocol = "IPv4" if ipv4 else "IPv6", PROTOCOL_NAMES[frontend.protocol]
            return members(self._tracker.slices(ref), family, name.port, protocol)
        entries, _ = resolve_ref(ref, self._tracker, self._context)
        return frozenset(
            backend for entry in entries if entry.owner == name for backend in entry.endpoints
        )
