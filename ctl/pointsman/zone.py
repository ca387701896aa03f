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

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from dns.exception import DNSException
from dns.name import Name, from_text, from_wire
from dns.rcode import NOERROR, NXDOMAIN
from dns.rdatatype import ANY, CNAME, HINFO, NS, PTR, SOA, SRV, TXT

from pointsman.dnswire import Answer, RRset, string, to_wire
from pointsman.names import is_label
from pointsman.objects import EndpointSlice, Ref, Service
from pointsman.zoneentries import (
    ADDRESS_SIZE,
    Entry,
    ExternalEntry,
    Path,
    make_entry,
    of_type,
    pack,
)

VERSION = "1.1.0"  # of the specification, answered at dns-version.<domain>
TTL = 5  # seconds, as CoreDNS: short, because endpoints come and go

_MAX_ALIASES = 8
_MAX_GLUE = 64  # SRV targets worth an additional section, which RFC 2782 leaves to the server
_MAX_DOMAIN = 59  # octets in wire form, so that host, Service and namespace of 63 fit into 255


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
        packed = [address for address in map(pack, nameservers) if address]
        self._own: dict[Path, Mapping[int, Sequence[bytes]]] = {
            (): {NS: [self._below("ns", "dns")]},
            ("svc",): {},
            ("dns",): {},
            ("ns", "dns"): {type_: of_type(packed, type_) for type_ in ADDRESS_SIZE},
            ("dns-version",): {TXT: [string(VERSION.encode())]},
        }
        self._entries: dict[Path, Entry] = {}  # by (name, namespace)
        self._namespaces: dict[str, int] = {}  # how many Services each has
        self._pointers: dict[bytes, tuple[tuple[str, Path], ...]] = {}  # packed: (host, key) …

    def put(self, service: Service, slices: Iterable[EndpointSlice] = ()) -> None:
        """Add or replace a Service with all its EndpointSlices, in time of their size.

        Raises ValueError, and keeps what was there, if its name or namespace is no DNS label.
        """
        key = (service.metadata.name.lower(), service.metadata.namespace.lower())
        if not all(map(is_label, key)):
            raise ValueError(f"{service.ref}: name and namespace must be DNS labels (RFC 1123)")
        self._replace(key, make_entry(service, slices, self._below(*key, "svc")))

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
            entry = self.make_entry(path)
            if not isinstance(entry, ExternalEntry) or len(path) > 3 or qtype == CNAME:
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
            qtype, rdata = HINFO, [string(b"RFC8482") + string(b"")]  # the smallest answer
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
        for qtype in ADDRESS_SIZE:
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
        entry = self.make_entry(path)
        return None if entry is None else entry.at(path[:-3], qtype)

    def make_entry(self, path: Path) -> Entry | None:
        return self._entries.get(path[-3:-1]) if path[-1:] == ("svc",) else None

    def _replace(self, key: Path, new: Entry | None) -> None:
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
        return b"".join(string(label.encode()) for label in labels) + self._suffix

    def _soa(self) -> bytes:
        """Serial, then refresh, retry, expire and negative TTL in seconds (RFC 1035, RFC 2308)."""
        numbers = struct.pack("!5I", self._serial, 7200, 1800, 86400, self._ttl)
        return self._below("ns", "dns") + self._below("hostmaster") + numbers


# The entries: what one Service answers with, in two methods.


def _reversed(path: Path) -> bytes:
    """The packed address of a name below in-addr.arpa or ip6.arpa, b"" for any other name."""
    labels = path[-3::-1]
    if path[-2:] == ("in-addr", "arpa"):
        return pack(".".join(labels))
    if path[-2:] == ("ip6", "arpa") and len(labels) == 32:
        groups = ("".join(labels[i : i + 4]) for i in range(0, 32, 4))
        return pack(":".join(groups))
    return b""


def _path(name: Name) -> Path:
    return tuple(label.lower().decode("latin-1") for label in name.labels[:-1])
