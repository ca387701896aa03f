"""What the Service default/kubernetes was when it was last seen with endpoints, kept in a file for
a start at which its ClusterIP leads nowhere yet. See `route`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pointsman import state
from pointsman.objects import EndpointSlice, Object, Ref, Service

log = logging.getLogger("pointsman.kube")

FILE = "api-servers.json"
_SERVICE = Ref("Service", "default", "kubernetes")


class Remembered(msgspec.Struct, frozen=True):
    """Addresses of the Service, and URLs of the API servers behind it."""

    cluster_ips: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()


class Branch:
    """Follows the Service; `now` is what to remember. Pure."""

    def __init__(self, start: Remembered) -> None:
        self.now = start
        self._slices: dict[Ref, tuple[str, ...]] = {}

    def follow(self, objects: Iterable[Object], deleted: Iterable[Ref]) -> bool:
        """Whether that changed anything. No endpoints at all changes nothing."""
        before, addresses = self.now, self.now.cluster_ips
        for ref in deleted:
            self._slices.pop(ref, None)
        for obj in objects:
            if isinstance(obj, Service):
                if obj.ref == _SERVICE:
                    spec = obj.spec
                    addresses = spec.cluster_ips or (spec.cluster_ip,) * bool(spec.cluster_ip)
            elif isinstance(obj, EndpointSlice) and obj.metadata.namespace == _SERVICE.namespace:
                if obj.service == _SERVICE.name:
                    self._slices[obj.ref] = tuple(_urls(obj))
                else:
                    self._slices.pop(obj.ref, None)
        found = tuple(sorted({url for urls in self._slices.values() for url in urls}))
        self.now = Remembered(addresses, found or before.endpoints)
        return self.now != before


def _urls(piece: EndpointSlice) -> Iterable[str]:
    ports = [port for port in piece.ports or () if port.port and port.protocol == "TCP"]
    port = next((port for port in ports if port.name == "https"), ports[0] if ports else None)
    for endpoint in (piece.endpoints or ()) if port and piece.address_type != "FQDN" else ():
        if endpoint.conditions.ready is not False:
            for address in endpoint.addresses[:1]:
                host = f"[{address}]" if ":" in address else address
                yield f"https://{host}:{port.port if port else 443}"


def load(directory: Path) -> Remembered:
    """Nothing, if there is no such file or it is not what `save` wrote."""
    try:
        return msgspec.convert(state.read_json(directory / FILE), Remembered)
    except msgspec.ValidationError:
        return Remembered()


def save(directory: Path, remembered: Remembered) -> None:
    """A failure is logged: it matters only at the next start."""
    try:
        state.write_json(directory / FILE, msgspec.to_builtins(remembered), durable=True)
    except OSError as error:
        log.warning("the API server's addresses could not be saved: %s", error)
