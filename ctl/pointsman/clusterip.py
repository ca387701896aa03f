"""Who owns which ClusterIP: what kube-apiserver's allocator does, where there is no API server.

Pure but for its own bookkeeping. An address has one owner, and whoever has it keeps it: a Service
that claims an address of another is told so and gets it when the other goes. A Service that names
no address gets one at a place in the CIDR that depends on its name alone, so that even without
saved claims the same manifests mostly get the same addresses.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from pointsman.events import Problem
from pointsman.objects import Ref, Service

_LATEST = datetime.max.replace(tzinfo=UTC)


class ClusterIPs:
    """Owners of ClusterIPs. Not for use by several threads at once.

    `cidrs` are one network for each family, the default family first; `claims` are the owners as
    `claims` gave them before a restart. Raises ValueError, naming the text, for a CIDR that is
    none or a second one of a family; claims that are no addresses are passed over.

    After any `assign` or `release`, `due` names the Services to assign again.
    """

    def __init__(self, cidrs: Sequence[str], claims: Mapping[str, Ref]) -> None:
        self._pools: dict[str, _Pool] = {}
        for cidr in cidrs:
            pool = _Pool(cidr)
            if pool.family in self._pools:
                raise ValueError(f"{cidr}: there is already a service CIDR of {pool.family}")
            self._pools[pool.family] = pool
        self._owners: dict[str, Ref] = {}
        self._claims: dict[str, Ref] | None = None  # a copy, until the next change
        self._held: defaultdict[Ref, list[str]] = defaultdict(list)
        # What a Service waits for, an address or a pool's family; and who waits, first come first.
        self._waits: defaultdict[Ref, set[str]] = defaultdict(set)
        self._queues: defaultdict[str, dict[Ref, None]] = defaultdict(dict)
        self._due: dict[Ref, None] = {}
        for text, ref in claims.items():
            if (address := _canonical(text)) and address not in self._owners:
                self._take(address, Ref(*ref))

    @property
    def claims(self) -> dict[str, Ref]:
        """Address, in its shortest form, to its owner: what is to be saved for the next start.

        The same dict until an owner changes, and never changed itself.
        """
        if self._claims is None:
            self._claims = dict(self._owners)
        return self._claims

    def assign_all(self, services: Iterable[Service]) -> tuple[list[Service], list[Problem]]:
        """As `assign`, for the complete list of Services, in which it keeps their order.

        Claims of Services that are not in it end. A new address claimed by several goes to the
        oldest by creationTimestamp, or to the first of those that have none; addresses asked for
        by name go before addresses allocated.
        """
        listed = {service.ref: service for service in services}
        for ref in [ref for ref in self._held if ref not in listed]:
            self.release(ref)
        turns = sorted(listed.values(), key=_turn)
        done = {service.ref: self.assign(service) for service in turns}
        while refs := self.due():
            done |= {ref: self.assign(listed[ref]) for ref in refs}
        assigned = [done[ref][0] for ref in listed]
        return assigned, [problem for ref in listed for problem in done[ref][1]]

    def assign(self, service: Service) -> tuple[Service, list[Problem]]:
        """The Service with clusterIP, clusterIPs and ipFamilies filled in, and what went wrong.

        Headless and ExternalName Services come back as they are. Assigning an unchanged Service
        again changes nothing. An address it could not get is left out; with none, clusterIP is "".
        """
        ref, spec = service.ref, service.spec
        self._stop_waiting(ref)
        if service.headless or spec.type == "ExternalName":
            self._keep_only(ref, ())
            return service, []
        problems: list[Problem] = []
        asked = self._asked(service, problems)
        families = self._families_to_allocate(service, asked, problems)
        mine = [
            *(a for a in asked if self._owners.get(a, ref) == ref),
            *(a for family in families if (a := self._kept(ref, family))),
        ]
        # What it no longer wants goes first: its old address may be the last of the CIDR.
        self._keep_only(ref, mine)
        got: list[str] = []
        for i, address in enumerate(asked):
            owner = self._owners.get(address, ref)
            if owner == ref:
                self._take(address, ref)
                got.append(address)
            else:
                self._wait(ref, address)
                field = f"spec.clusterIPs[{i}]" if spec.cluster_ips else "spec.clusterIP"
                message = f"{address} belongs to {owner}, which had it before {ref}"
                problems.append(
                    _problem(
                        ref, field, message, "choose another, or none", "ClusterIPAlreadyAllocated"
                    )
                )
        for family in families:
            if found := self._kept(ref, family) or self._allocate(ref, family, problems):
                got.append(found)
        return _with_addresses(service, got), problems

    def release(self, ref: Ref) -> None:
        """The Service is gone: its addresses are free, and those who wait for them are due."""
        self._stop_waiting(ref)
        self._keep_only(ref, ())

    def due(self) -> tuple[Ref, ...]:
        """Services that can now get what they were refused, first come first; then forgets them.

        Assigning them may make others due, so call it until it gives ().
        """
        due, self._due = tuple(self._due), {}
        return due

    def _asked(self, service: Service, problems: list[Problem]) -> list[str]:
        spec = service.spec
        asked = []
        for text in spec.cluster_ips or ((spec.cluster_ip,) if spec.cluster_ip else ()):
            if address := _canonical(text):
                asked += [] if address in asked else [address]
            else:
                message = f'"{text}" is not an IP address'
                mend = "write one, or leave it out and one is allocated"
                problems.append(
                    _problem(service.ref, "spec.clusterIP", message, mend, "ClusterIPNotValid")
                )
        return asked

    def _families_to_allocate(
        self, service: Service, asked: list[str], problems: list[Problem]
    ) -> list[str]:
        spec = service.spec
        if spec.cluster_ip and not asked:
            return []
        have = [_family(address) for address in asked]
        wanted = list(spec.ip_families) or have[:] or list(self._pools)[:1]
        must = list(spec.ip_families)
        if spec.ip_family_policy in ("PreferDualStack", "RequireDualStack"):
            wanted += [f for f in ("IPv4", "IPv6") if f not in wanted and f in self._pools]
        if spec.ip_family_policy == "RequireDualStack":
            must = ["IPv4", "IPv6"]
        missing = [f for f in must if f not in have and f not in self._pools]
        if not (missing or wanted):
            missing = ["IPv4"]
        if not missing:
            return [family for family in wanted if family not in have]
        for family in missing:
            field = "spec.ipFamilyPolicy" if family not in spec.ip_families else "spec.ipFamilies"
            message = f"there is no {family} service CIDR to take an address from"
            mend = f"add an {family} service CIDR, or ask for the other family only"
            problems.append(_problem(service.ref, field, message, mend, "ClusterIPNotAllocated"))
        return []

    def _kept(self, ref: Ref, family: str) -> str | None:
        """An address that the Service has already, if it is still one of the CIDR's."""
        held = (a for a in self._held.get(ref, ()) if a in self._pools[family])
        return next(held, None)

    def _allocate(self, ref: Ref, family: str, problems: list[Problem]) -> str | None:
        pool = self._pools[family]
        if address := pool.free_address(f"{ref.namespace}/{ref.name}", self._owners):
            self._take(address, ref)
            return address
        self._wait(ref, family)
        message = f"all {pool.usable} addresses of the service CIDR {pool.network} are in use"
        mend = "use a larger service CIDR, or delete Services"
        problems.append(_problem(ref, "spec.clusterIP", message, mend, "ClusterIPNotAllocated"))
        return None

    def _take(self, address: str, ref: Ref) -> None:
        if address not in self._owners:
            self._claims = None
            self._owners[address] = ref
            self._held[ref].append(address)
            if pool := self._pools.get(_family(address)):
                pool.used += pool.offers(address)

    def _keep_only(self, ref: Ref, wanted: Sequence[str]) -> None:
        for address in [a for a in self._held.get(ref, ()) if a not in wanted]:
            self._claims = None
            del self._owners[address]
            self._held[ref].remove(address)
            self._due |= self._queues.get(address, {})
            family = _family(address)
            if (pool := self._pools.get(family)) and pool.offers(address):
                pool.used -= 1
                self._due |= self._queues.get(family, {})
        if not self._held.get(ref):
            self._held.pop(ref, None)

    def _wait(self, ref: Ref, what: str) -> None:
        self._waits[ref].add(what)
        self._queues[what][ref] = None

    def _stop_waiting(self, ref: Ref) -> None:
        self._due.pop(ref, None)
        for what in self._waits.pop(ref, ()):
            del self._queues[what][ref]
            if not self._queues[what]:
                del self._queues[what]


class _Pool:
    """A service CIDR and how many of its addresses are in use."""

    def __init__(self, cidr: str) -> None:
        self.network = ipaddress.ip_network(cidr)
        self.family = f"IPv{self.network.version}"
        self._first = int(self.network.network_address)
        self._size = self.network.num_addresses
        # By custom .1 is the Service kubernetes and .10 the DNS server's.
        self._reserved = {0, 1, 10, self._size - 1}
        self.usable = self._size - sum(offset < self._size for offset in self._reserved)
        self.used = 0

    def __contains__(self, address: str) -> bool:
        return 0 <= self._offset(address) < self._size

    def offers(self, address: str) -> bool:
        return address in self and self._offset(address) not in self._reserved

    def free_address(self, name: str, owners: Mapping[str, Ref]) -> str | None:
        """A free address, sought from a place and in strides that the name decides.

        Strides that differ keep a nearly full CIDR from being searched end to end.
        """
        if self.used >= self.usable:
            return None
        digest = hashlib.blake2b(name.encode(), digest_size=32).digest()
        offset = int.from_bytes(digest[:16]) % self._size
        stride = int.from_bytes(digest[16:]) | 1  # odd, so it visits all of a power of two
        while True:
            if offset not in self._reserved:
                address = str(self.network[offset])
                if address not in owners:
                    return address
            offset = (offset + stride) % self._size

    def _offset(self, address: str) -> int:
        parsed = ipaddress.ip_address(address)
        return int(parsed) - self._first if parsed.version == self.network.version else -1


def _turn(service: Service) -> tuple[bool, datetime]:
    created = service.metadata.creation_timestamp or _LATEST
    if created.tzinfo is None:
        created = created.replace(tzinfo=UTC)
    return not service.spec.cluster_ip, created


def _with_addresses(service: Service, addresses: list[str]) -> Service:
    families = tuple(map(_family, addresses)) or service.spec.ip_families
    spec = msgspec.structs.replace(
        service.spec,
        cluster_ip=addresses[0] if addresses else "",
        cluster_ips=tuple(addresses),
        ip_families=families,
    )
    return msgspec.structs.replace(service, spec=spec)


def _problem(ref: Ref, field: str, message: str, mend: str, reason: str) -> Problem:
    """Reasons are those of kube-apiserver's own check of ClusterIPs, where it has one."""
    return Problem(message, mend, object=str(ref), field=field, reason=reason)


def _canonical(text: str) -> str | None:
    try:
        if ":" not in text:  # by far the most; ipaddress takes much longer
            return socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, text))
        return str(ipaddress.ip_address(text))
    except (ValueError, OSError):
        return None


def _family(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"
