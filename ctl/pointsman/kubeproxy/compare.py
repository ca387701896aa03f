"""Whether one proxy serves all that the other does, and so may take its place. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from pointsman.kubeproxy.answers import (
    ALONE,
    CLUSTER_IP,
    DROP,
    ENDPOINTS,
    EXTERNAL,
    NODE_PORT,
    REJECT,
    Answer,
    Client,
    Proxy,
    Target,
)
from pointsman.ranges import Source, holds, parse
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    SCTP,
    Address,
    Frontend,
    is_ipv4,
    to_address,
    to_text,
)
from pointsman.verify import Difference

#: Where a client outside may be taken from that no range has: addresses for documentation.
_NOWHERE = tuple(
    to_address(str(host))
    for network in ("198.51.100.0/24", "203.0.113.0/24", "192.0.2.0/24", "2001:db8::/120")
    for host in ipaddress.ip_network(network).hosts()
)
_NO = (REJECT, DROP)
_LINK_LOCAL = (parse("fe80::/10"),)
_LOOPBACK = to_address("127.0.0.1")


@dataclass(frozen=True, slots=True)
class Names:
    """Who is to be replaced, and by whom, in messages."""

    old: str
    new: str


RETIRE = Names("kube-proxy", "Pointsman")
BACK = Names("Pointsman", "kube-proxy")


@dataclass
class Compared:
    """How many targets there are, what the new proxy lacks, and what is meant to be otherwise."""

    targets: int = 0
    #: Of those, what clients outside may ask for.
    outside: int = 0
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(
    old: Proxy,
    new: Proxy,
    local: Collection[Address],
    names: Names,
    *,
    outside: bool = True,
) -> Compared:
    """Asks the old proxy for all that it serves, and the new one for the same. `local` are this
    node's addresses; without `outside` nothing is asked for clients there."""
    found = Compared()
    for target in old.targets():
        found.targets += 1
        found.outside += target.kind in (EXTERNAL, NODE_PORT)
        if target.frontend.protocol == SCTP:
            message = f"{names.old} serves SCTP, {names.new} does not"
            if names is RETIRE:
                found.differences.append(Difference("sctp", _text(target), message))
            continue
        places = list(_at(target, local))
        if names is BACK:
            places = _where_served(new, places, local, found)
        elif not _reached(old, target, local):
            message = "kube-proxy has rules for it, but nothing leads a packet to them"
            found.differences.append(Difference("not-understood", _text(target), message))
        for each in places:
            if names is RETIRE and _left_on_purpose(new, each, local):
                found.notes.append(
                    f"{_text(each)}: the address is on a device of this node, so {names.new} "
                    "leaves it to what listens there"
                )
                continue
            found.differences += _compare(old, new, each, local, names, outside=outside)
    return found


def _at(target: Target, local: Collection[Address]) -> Iterator[Target]:
    """A NodePort at each address of this node; everything else where it is."""
    address = target.frontend.address
    if address not in (ANY_IPV4, ANY_IPV6):
        yield target
        return
    ipv4 = address == ANY_IPV4
    places = [each for each in sorted(local) if is_ipv4(each) == ipv4]
    for place in places + [_LOOPBACK] * ipv4:
        if not holds(_LINK_LOCAL, place):
            yield target._replace(frontend=target.frontend._replace(address=place))


def _where_served(
    new: Proxy, places: list[Target], local: Collection[Address], found: Compared
) -> list[Target]:
    """kube-proxy may have NodePorts at some addresses only, and in nftables mode has none at
    loopback: a NodePort that is somewhere is as it is meant."""
    served = [each for each in places if _asked_here(new, each, local).verdict != ALONE]
    if not served:
        return [each for each in places if each.frontend.address != _LOOPBACK]
    for each in places:
        note = f"NodePorts are not served at {to_text(each.frontend.address)} by kube-proxy"
        if each not in served and note not in found.notes:
            found.notes.append(note)
    return served


def _reached(old: Proxy, target: Target, local: Collection[Address]) -> bool:
    """Whether a walk comes to what is said to be served: else nothing is known of it. A NodePort
    may be for addresses that this node does not have."""
    frontend = target.frontend
    clients = _here(frontend, local), _stranger(frontend, local)
    return target.kind == NODE_PORT or any(
        old.ask(client, frontend).verdict != ALONE for client in clients
    )


def _left_on_purpose(new: Proxy, target: Target, local: Collection[Address]) -> bool:
    """Pointsman leaves ClusterIPs alone that a device has; external addresses it does not."""
    may_be = target.kind not in (NODE_PORT, EXTERNAL) and target.frontend.address in local
    return may_be and _asked_here(new, target, local).verdict == ALONE


def _asked_here(proxy: Proxy, target: Target, local: Collection[Address]) -> Answer:
    return proxy.ask(_here(target.frontend, local), target.frontend)


def _compare(
    old: Proxy,
    new: Proxy,
    target: Target,
    local: Collection[Address],
    names: Names,
    *,
    outside: bool,
) -> Iterator[Difference]:
    frontend = target.frontend
    here = _here(frontend, local)
    stranger = _stranger(frontend, local)
    ranges: set[Source] = set()
    if target.kind != CLUSTER_IP:
        ranges = old.ranges(stranger, frontend) | new.ranges(stranger, frontend)
        ranges = {source for source in ranges if source[0] != frontend.address}
        stranger = _stranger(frontend, local, ranges)
    want, have = old.ask(here, frontend), new.ask(here, frontend)
    found = list(_differences(want, have, names, ranges=bool(ranges)))
    if names is BACK and target.kind == EXTERNAL and have.verdict == ALONE and want.verdict in _NO:
        found = []  # kube-proxy's iptables mode refuses these to clients outside only
    others = target.kind in (EXTERNAL, NODE_PORT) and frontend.address != _LOOPBACK and outside
    if found and not (old.asks_who and new.asks_who) and target.kind != CLUSTER_IP:
        # IPVS gives all clients what one policy says: it may be that for clients outside.
        strangers = old.ask(stranger, frontend), new.ask(stranger, frontend)
        if not list(_differences(*strangers, names, affinity=False)):
            found = []
    yield from (Difference(kind, _text(target), message) for kind, message in found)
    if not others:
        return
    seen = set(found)
    for client in (stranger, *(Client(address, False) for address, _ in sorted(ranges))):
        want, have = old.ask(client, frontend), new.ask(client, frontend)
        for kind, message in _differences(want, have, names, affinity=False):
            if (kind, message) not in seen:
                seen.add((kind, message))
                who = f"clients outside such as {to_text(client.address)}"
                yield Difference(f"outside-{kind}", _text(target), f"{who}: {message}")


def _differences(
    want: Answer, have: Answer, names: Names, *, affinity: bool = True, ranges: bool = False
) -> Iterator[tuple[str, str]]:
    """Kind and message. `ranges`: kube-proxy may drop for them what is asked from here; with
    Pointsman they do not concern clients inside of the cluster."""
    if want.verdict == ALONE:
        return
    if want.verdict == have.verdict == ENDPOINTS:
        for kind, verb, endpoints in (
            ("endpoint-missing", "lacks", want.endpoints - have.endpoints),
            ("endpoint-extra", "also has", have.endpoints - want.endpoints),
        ):
            if endpoints:
                listed = ", ".join(sorted(endpoints))
                yield kind, f"{names.new} {verb} {listed}, compared with {names.old}"
        if affinity and want.affinity != have.affinity:
            text = f"a client keeps its endpoint for {want.affinity} s with {names.old}"
            yield "affinity", f"{text}, for {have.affinity} s with {names.new}"
        return
    if want.verdict in _NO and have.verdict in _NO:
        return
    theirs, ours = (want, have) if names is RETIRE else (have, want)
    if ranges and (theirs.verdict, ours.verdict) == (DROP, ENDPOINTS):
        return
    kind = "not-served" if want.verdict == ENDPOINTS else "refused-by-one"
    yield kind, f"with {names.old}: {want}; with {names.new}: {have}"


def _here(frontend: Frontend, local: Collection[Address]) -> Client:
    """A process of this node, as the kernel chooses its source: the address that it dials, if that
    is the node's own."""
    ipv4 = is_ipv4(frontend.address)
    if frontend.address in local or frontend.address == _LOOPBACK:
        return Client(frontend.address, True)
    own = (each for each in sorted(local) if is_ipv4(each) == ipv4 and not holds(_LINK_LOCAL, each))
    return Client(next(own, to_address("127.0.0.1" if ipv4 else "::1")), True)


def _stranger(
    frontend: Frontend, local: Collection[Address], ranges: Iterable[Source] = ()
) -> Client:
    """A client that is in none of the ranges."""
    ipv4 = is_ipv4(frontend.address)
    ranges = tuple(ranges)
    for address in _NOWHERE:
        if is_ipv4(address) == ipv4 and address not in local and not holds(ranges, address):
            return Client(address, False)
    return Client(to_address("240.0.0.1" if ipv4 else "fc00::1"), False)


def _text(target: Target) -> str:
    return f"{target.frontend} ({target.service})" if target.service else str(target.frontend)
