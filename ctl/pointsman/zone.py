"""The DNS names of Services: Services and EndpointSlices in, answers out; no I/O.

Follows the Kubernetes DNS-Based Service Discovery specification 1.1.0 and, where that leaves a
choice, CoreDNS's kubernetes plugin: A, AAAA, SRV, CNAME and PTR for Services; SOA, NS and TXT for
the domain itself.

One thread may call `put` and `delete` while others call `lookup`. Everything a Service answers
with stands in one entry that is never changed, and an update replaces the entry by one dict
assignment, which CPython makes atomic: a reader sees all of the old Service or all of the new.
The index for PTR is replaced address by address in the same way.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple

from dns.exception import DNSException
from dns.name import Name, from_text, from_wire
from dns.rcode import NOERROR, NXDOMAIN, Rcode
from dns.rdatatype import AAAA, ANY, CNAME, HINFO, NS, PTR, SOA, SRV, TXT, A

from pointsman.objects import EndpointSlice, Ref, Service

VERSION = "1.1.0"  # of the specification, answered at dns-version.<domain>
TTL = 5  # seconds, as CoreDNS: short, because endpoints come and go

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123, folded to lower case
_SIZE: Mapping[int, int] = {A: 4, AAAA: 16}  # octets of an address by record type
_MAX_ALIASES = 8
_MAX_GLUE = 64  # SRV targets worth an additional section, which RFC 2782 leaves to the server
_MAX_DOMAIN = 59  # octets in wire form, so that host, Service and namespace of 63 fit into 255

Path = tuple[str, ...]  # labels in lower case, without the domain's


class RRset(NamedTuple):
    """The records of one owner and type; `ttl` in seconds, `rdata` in uncompressed wire form."""

    owner: Name
    type: int
    ttl: int
    rdata: Sequence[bytes]


class Answer(NamedTuple):
    """An answer's code and sections; a negative one carries the SOA in `authority` (RFC 2308).

    `outside` is where a chain of CNAMEs leaves the domain: the records of that name are missing
    in `answer`, for a resolver to add.
    """

    rcode: Rcode
    answer: tuple[RRset, ...] = ()
    authority: tuple[RRset, ...] = ()
    additional: tuple[RRset, ...] = ()
    outside: Name | None = None


class Zone:
    """All names below `domain` and the PTR records of their addresses.

    `nameservers` are the addresses of ns.dns.<domain>, which the domain's NS record names.
    Raises ValueError for a domain that is no DNS name or longer than 59 octets.
    """

    def __init__(
        self, domain: str = "cluster.local", *, nameservers: Iterable[str] = (), ttl: int = TTL
    ) -> None:
        try:
            self.domain = from_text(domain.lower().rstrip(".") + ".")
        except (DNSException, UnicodeError) as error:
            raise ValueError(f"domain {domain!r} is no DNS name: {error}") from error
        self._suffix = to_wire(self.domain)
        if not 1 < len(self._suffix) <= _MAX_DOMAIN:
            raise ValueError(f"domain {domain!r}: must have 1 to {_MAX_DOMAIN - 2} characters")
        self._labels = _path(self.domain)
        self._ttl = ttl
        self._serial = 1
        packed = [address for address in map(_pack, nameservers) if address]
        self._own: dict[Path, Mapping[int, Sequence[bytes]]] = {
            (): {NS: [self._below("ns", "dns")]},
            ("svc",): {},
            ("dns",): {},
            ("ns", "dns"): {type_: _of_type(packed, type_) for type_ in _SIZE},
            ("dns-version",): {TXT: [_string(VERSION.encode())]},
        }
        self._entries: dict[Path, _Entry] = {}  # by (name, namespace)
        self._namespaces: dict[str, int] = {}  # how many Services each has
        self._pointers: dict[bytes, tuple[tuple[str, Path], ...]] = {}  # packed: (host, key) …

    def put(self, service: Service, slices: Iterable[EndpointSlice] = ()) -> None:
        """Add or replace a Service with all its EndpointSlices, in time of their size.

        Raises ValueError, and keeps what was there, if its name or namespace is no DNS label.
        """
        key = (service.metadata.name.lower(), service.metadata.namespace.lower())
        if not all(map(_LABEL.fullmatch, key)):
            raise ValueError(f"{service.ref}: name and namespace must be DNS labels (RFC 1123)")
        self._replace(key, _entry(service, slices, self._below(*key, "svc")))

    def delete(self, ref: Ref) -> None:
        """Remove a Service; one that is not there is passed over."""
        self._replace((ref.name.lower(), ref.namespace.lower()), None)

    def lookup(self, qname: Name, qtype: int) -> Answer | None:
        """Answer a question of class IN for an absolute name; None: it is not ours to answer.

        Not ours is what lies outside the domain, save PTR questions for addresses known here.
        """
        path = _path(qname)
        if path[-len(self._labels) :] != self._labels:
            hosts = self._pointers.get(_reversed(path), ()) if qtype == PTR else ()
            names = [self._below(*filter(None, (host, *key, "svc"))) for host, key in hosts]
            return Answer(NOERROR, (RRset(qname, PTR, self._ttl, names),)) if names else None
        aliases: list[RRset] = []
        while len(aliases) < _MAX_ALIASES:
            path = path[: -len(self._labels)]
            entry = self._entry(path)
            if not isinstance(entry, _External) or len(path) > 3 or qtype == CNAME:
                return self._answer(aliases, qname, path, qtype)
            aliases.append(RRset(qname, CNAME, self._ttl, [to_wire(entry.alias)]))
            qname = entry.alias
            path = _path(qname)
            if path[-len(self._labels) :] != self._labels:
                return Answer(NOERROR, tuple(aliases), outside=qname)
        return Answer(NOERROR, tuple(aliases))

    def _answer(self, aliases: list[RRset], qname: Name, path: Path, qtype: int) -> Answer:
        rdata = self._at(path, qtype)
        if qtype == ANY and rdata is not None:
            qtype, rdata = HINFO, [_string(b"RFC8482") + _string(b"")]  # the smallest answer
        if not rdata:
            soa = RRset(self.domain, SOA, self._ttl, [self._soa()])
            return Answer(NXDOMAIN if rdata is None else NOERROR, tuple(aliases), (soa,))
        glue: tuple[RRset, ...] = ()
        if qtype in (SRV, NS) and len(rdata) <= _MAX_GLUE:
            skip = 6 if qtype == SRV else 0  # priority, weight and port stand before the target
            glue = tuple(
                chain.from_iterable(self._glue(t) for t in {r[skip:]: None for r in rdata})
            )
        return Answer(NOERROR, (*aliases, RRset(qname, qtype, self._ttl, rdata)), additional=glue)

    def _glue(self, target: bytes) -> Iterable[RRset]:
        """The address records of one of our own names, given in wire form."""
        name, _ = from_wire(target, 0)
        for qtype in _SIZE:
            rdata = self._at(_path(name)[: -len(self._labels)], qtype)
            if rdata:
                yield RRset(name, qtype, self._ttl, rdata)

    def _at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        """The record data at a path below the domain, () for none, None if there is no name."""
        own = self._own.get(path)
        if own is not None:
            return [self._soa()] if qtype == SOA and not path else own.get(qtype, ())
        if path[-1] != "svc":
            return None
        if len(path) == 2:
            return () if path[0] in self._namespaces else None
        entry = self._entry(path)
        return None if entry is None else entry.at(path[:-3], qtype)

    def _entry(self, path: Path) -> _Entry | None:
        return self._entries.get(path[-3:-1]) if path[-1:] == ("svc",) else None

    def _replace(self, key: Path, new: _Entry | None) -> None:
        old = self._entries.get(key)
        if old is None and new is None:
            return
        namespace = key[1]
        if new is None:
            del self._entries[key]
        else:
            self._entries[key] = new
        services = self._namespaces.get(namespace, 0) + (old is None) - (new is None)
        if services:
            self._namespaces[namespace] = services
        else:
            del self._namespaces[namespace]
        before = old.hosts() if old else {}
        after = new.hosts() if new else {}
        for packed in before.keys() | after.keys():
            if before.get(packed) == after.get(packed):
                continue
            others = tuple(p for p in self._pointers.get(packed, ()) if p[1] != key)
            if packed in after:
                self._pointers[packed] = (*others, (after[packed], key))
            elif others:
                self._pointers[packed] = others
            else:
                del self._pointers[packed]
        self._serial = self._serial % 0xFFFFFFFF + 1

    def _below(self, *labels: str) -> bytes:
        return b"".join(_string(label.encode()) for label in labels) + self._suffix

    def _soa(self) -> bytes:
        """Serial, then refresh, retry, expire and negative TTL in seconds (RFC 1035, RFC 2308)."""
        numbers = struct.pack("!5I", self._serial, 7200, 1800, 86400, self._ttl)
        return self._below("ns", "dns") + self._below("hostmaster") + numbers


# The entries: what one Service answers with, in two methods.
# at(path, qtype): record data at a path left of the Service's name; () for none, None for no name.
# hosts(): the packed addresses that have a PTR, with the label before the Service's name or "".


class _ClusterIP:
    """Packs its records anew each time: the Service is in memory anyway, the records are not."""

    __slots__ = ("_service", "_target")

    def __init__(self, service: Service, target: bytes) -> None:
        self._service = service
        self._target = target

    def at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        if not path and qtype in _SIZE:
            return _of_type(self.hosts(), qtype)
        ports = self._service.spec.ports
        return _at_port(
            _by_port((port.name, port.protocol, port.port, self._target) for port in ports),
            path,
            qtype,
        )

    def hosts(self) -> Mapping[bytes, str]:
        spec = self._service.spec
        packed = map(_pack, spec.cluster_ips or (spec.cluster_ip,))
        return {address: "" for address in packed if address}


class _Headless:
    """Ready endpoints by host label. Without any, even the Service's own name does not exist."""

    __slots__ = ("_addresses", "_hosts", "_ports")

    def __init__(self, slices: Iterable[EndpointSlice] = (), target: bytes = b"") -> None:
        hosts: dict[str, dict[bytes, None]] = {}
        ports: list[tuple[str | None, str, int, bytes]] = []
        for piece in slices:
            for endpoint in piece.endpoints or ():
                packed = [address for address in map(_pack, endpoint.addresses) if address]
                if endpoint.conditions.ready is False or piece.address_type == "FQDN":
                    continue
                for address in packed:
                    host = endpoint.hostname.lower()
                    if not _LABEL.fullmatch(host):
                        host = _dashed(address)
                    hosts.setdefault(host, {})[address] = None
                    name = _string(host.encode()) + target
                    ports += (
                        (port.name, port.protocol, port.port, name)
                        for port in piece.ports or ()
                        if port.port is not None
                    )
        self._hosts = {host: tuple(addresses) for host, addresses in hosts.items()}
        every = tuple(dict.fromkeys(chain.from_iterable(self._hosts.values())))
        self._addresses = {qtype: _of_type(every, qtype) for qtype in _SIZE}
        self._ports = _by_port(ports)

    def at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        if not self._hosts:
            return None
        if not path and qtype in _SIZE:
            return self._addresses[qtype]
        if len(path) == 1 and path[0] in self._hosts:
            return _of_type(self._hosts[path[0]], qtype)
        return _at_port(self._ports, path, qtype)

    def hosts(self) -> Mapping[bytes, str]:
        return {address: host for host, packed in self._hosts.items() for address in packed}


class _External(NamedTuple):
    alias: Name

    def at(self, path: Path, qtype: int) -> Sequence[bytes] | None:
        if path:
            return None
        return [to_wire(self.alias)] if qtype == CNAME else ()

    def hosts(self) -> Mapping[bytes, str]:
        return {}


_Entry = _ClusterIP | _Headless | _External


def _entry(service: Service, slices: Iterable[EndpointSlice], target: bytes) -> _Entry:
    """`target` is the Service's full name in wire form."""
    spec = service.spec
    if spec.type == "ExternalName":
        name = spec.external_name.rstrip(".")
        try:
            # A CNAME can't point to an address; as in CoreDNS such a Service has no records.
            return _External(from_text(f"{name}.")) if name and not _pack(name) else _Headless()
        except (DNSException, UnicodeError):
            return _Headless()
    if service.headless or "None" in spec.cluster_ips:
        return _Headless(slices, target)
    return _ClusterIP(service, target)


def _by_port(
    ports: Iterable[tuple[str | None, str, int, bytes]],
) -> Mapping[Path, Sequence[bytes]]:
    """SRV data by path such as ("_http", "_tcp"), from (port name, protocol, number, target).

    A port without a name, which has no SRV name of its own, stands under ("", "_tcp").
    Equal records are one: a dual-stack endpoint with a hostname is in two slices.
    """
    records: dict[Path, dict[bytes, None]] = {}
    for name, protocol, number, target in ports:
        label = f"_{name.lower()}" if name and _LABEL.fullmatch(name.lower()) else ""
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


def _of_type(packed: Iterable[bytes], qtype: int) -> Sequence[bytes]:
    size = _SIZE.get(qtype)
    return tuple(address for address in packed if len(address) == size)


def _pack(address: str) -> bytes:
    """4 or 16 octets in network order, b"" for what is no address."""
    try:
        return inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except (OSError, ValueError):
        return b""


def _dashed(packed: bytes) -> str:
    """The host label of an endpoint without a hostname, as CoreDNS makes it: 10-0-0-1, fd00--1."""
    text = inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)
    return text.replace(".", "-").replace(":", "-")


def _reversed(path: Path) -> bytes:
    """The packed address of a name below in-addr.arpa or ip6.arpa, b"" for any other name."""
    labels = path[-3::-1]
    if path[-2:] == ("in-addr", "arpa"):
        return _pack(".".join(labels))
    if path[-2:] == ("ip6", "arpa") and len(labels) == 32:
        groups = ("".join(labels[i : i + 4]) for i in range(0, 32, 4))
        return _pack(":".join(groups))
    return b""


def _path(name: Name) -> Path:
    return tuple(label.lower().decode("latin-1") for label in name.labels[:-1])


def to_wire(name: Name) -> bytes:
    """A name as uncompressed record data (RFC 1035, 3.1)."""
    return b"".join(map(_string, name.labels))


def _string(text: bytes) -> bytes:
    """A label or character-string: its length in one octet, then its octets."""
    return bytes((len(text),)) + text
