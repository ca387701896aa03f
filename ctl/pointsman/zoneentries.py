"""What one Service answers with in the DNS: its records, by the path left of its name. Pure.

Each kind of entry has two methods. `at(path, qtype)`: the record data at a path left of the
Service's name, () for none, None if there is no such name. `hosts()`: the packed addresses that
have a PTR, with the label before the Service's name or "". An entry is never changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple

from dns.exception import DNSException
from dns.name import Name, from_text
from dns.rdatatype import AAAA, CNAME, SRV, A

from pointsman.dnswire import string, to_wire
from pointsman.names import is_label
from pointsman.objects import EndpointSlice, Service

ADDRESS_SIZE: Mapping[int, int] = {A: 4, AAAA: 16}  # octets of an address by record type

Path = tuple[str, ...]  # labels in lower case, without the domain's


class ClusterIPEntry:
    """Packs its records anew each time: the Service is in memory anyway, the records are not."""

    __slots__ = ("_service", "_target")

    def __init__(self, service: Service, target: bytes) -> None:
        self._service = service
        self._target = target

    def at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        if not path and qtype in ADDRESS_SIZE:
            return of_type(self.hosts(), qtype)
        ports = self._service.spec.ports
        return _at_port(
            _by_port((port.name, port.protocol, port.port, self._target) for port in ports),
            path,
            qtype,
        )

    def hosts(self) -> Mapping[bytes, str]:
        spec = self._service.spec
        packed = map(pack, spec.cluster_ips or (spec.cluster_ip,))
        return {address: "" for address in packed if address}


class HeadlessEntry:
    """Ready endpoints by host label. Without any, even the Service's own name does not exist."""

    __slots__ = ("_addresses", "_hosts", "_ports")

    def __init__(self, slices: Iterable[EndpointSlice] = (), target: bytes = b"") -> None:
        hosts: dict[str, dict[bytes, None]] = {}
        ports: list[tuple[str | None, str, int, bytes]] = []
        for piece in slices:
            for endpoint in piece.endpoints or ():
                packed = [address for address in map(pack, endpoint.addresses) if address]
                if endpoint.conditions.ready is False or piece.address_type == "FQDN":
                    continue
                for address in packed:
                    host = endpoint.hostname.lower()
                    if not is_label(host):
                        host = _dashed(address)
                    hosts.setdefault(host, {})[address] = None
                    name = string(host.encode()) + target
                    ports += (
                        (port.name, port.protocol, port.port, name)
                        for port in piece.ports or ()
                        if port.port is not None
                    )
        self._hosts = {host: tuple(addresses) for host, addresses in hosts.items()}
        every = tuple(dict.fromkeys(chain.from_iterable(self._hosts.values())))
        self._addresses = {qtype: of_type(every, qtype) for qtype in ADDRESS_SIZE}
        self._ports = _by_port(ports)

    def at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        if not self._hosts:
            return None
        if not path and qtype in ADDRESS_SIZE:
            return self._addresses[qtype]
        if len(path) == 1 and path[0] in self._hosts:
            return of_type(self._hosts[path[0]], qtype)
        return _at_port(self._ports, path, qtype)

    def hosts(self) -> Mapping[bytes, str]:
        return {address: host for host, packed in self._hosts.items() for address in packed}


class ExternalEntry(NamedTuple):
    alias: Name

    def at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        if path:
            return None
        return [to_wire(self.alias)] if qtype == CNAME else ()

    def hosts(self) -> Mapping[bytes, str]:
        return {}


Entry = ClusterIPEntry | HeadlessEntry | ExternalEntry


def make_entry(service: Service, slices: Iterable[EndpointSlice], target: bytes) -> Entry:
    """`target` is the Service's full name in wire form."""
    spec = service.spec
    if spec.type == "ExternalName":
        name = spec.external_name.rstrip(".")
        try:
            # A CNAME can't point to an address; as in CoreDNS such a Service has no records.
            return (
                ExternalEntry(from_text(f"{name}.")) if name and not pack(name) else HeadlessEntry()
            )
        except (DNSException, UnicodeError):
            return HeadlessEntry()
    if service.headless or "None" in spec.cluster_ips:
        return HeadlessEntry(slices, target)
    return ClusterIPEntry(service, target)


def _by_port(
    ports: Iterable[tuple[str | None, str, int, bytes]],
) -> Mapping[Path, Sequence[bytes]]:
    """SRV data by path such as ("_http", "_tcp"), from (port name, protocol, number, target).

    A port without a name, which has no SRV name of its own, stands under ("", "_tcp").
    Equal records are one: a dual-stack endpoint with a hostname is in two slices.
    """
    records: dict[Path, dict[bytes, None]] = {}
    for name, protocol, number, target in ports:
        label = f"_{name.lower()}" if name and is_label(name.lower()) else ""
        rdata = struct.pack("!3H", 0, 100, number) + target  # priority, weight
        records.setdefault((label, f"_{protocol.lower()}"), {})[rdata] = None
    return {path: tuple(rdata) for path, rdata in records.items()}


def _at_port(
    ports: Mapping[Path, Sequence[bytes]], path: Path, qtype: int
) -> Sequence[bytes] | None:
    if not path:  # as in CoreDNS, the Service's own name has the SRV records of every port
        return tuple(chain.from_iterable(ports.values())) if qtype == SRV else ()
    if path in ports:
        return ports[path] if qtype == SRV else ()
    return () if any(label and (protocol,) == path for label, protocol in ports) else None


def of_type(packed: Iterable[bytes], qtype: int) -> Sequence[bytes]:
    size = ADDRESS_SIZE.get(qtype)
    return tuple(address for address in packed if len(address) == size)


def pack(address: str) -> bytes:
    """4 or 16 octets in network order, b"" for what is no address."""
    try:
        return inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except (OSError, ValueError):
        return b""


def _dashed(packed: bytes) -> str:
    """The host label of an endpoint without a hostname, as CoreDNS makes it: 10-0-0-1, fd00--1."""
    text = inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)
    return text.replace(".", "-").replace(":", "-")
