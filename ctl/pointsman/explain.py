"""What the programs do with one destination: the walk of bpf/lookup.h, step by step. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pointsman import abi
from pointsman.affinityrows import decode_affinity
from pointsman.explainchoice import Candidate, candidate_step, choice, outcome
from pointsman.inspect import (
    LOOPBACK,
    NODE,
    PASS,
    POD,
    REMOTE_NODE,
    UNKNOWN,
    PolicyRow,
    Reader,
    algorithm_name,
    choice_words,
    cidr_text,
    empty_name,
    flags_text,
    policy_row,
)
from pointsman.marks import fold
from pointsman.plan import Element, Slot
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOL_NAMES,
    TCP,
    UDP,
    Address,
    Frontend,
    PortName,
    endpoint_text,
    is_ipv4,
    to_address,
    to_text,
)

TRANSLATED, REFUSED, UNREACHABLE = "translated", "refused", "unreachable"
NOT_A_SERVICE = "not-a-service"
#: Who connects: a process in the host's network namespace, or one in a namespace of its own.
HOST, ELSEWHERE = "host", "pod"
_ERRNO = {REFUSED: "ECONNREFUSED", UNREACHABLE: "EHOSTUNREACH"}
#: What a kernel makes of all of them whose programs have no bpf_set_retval().
_NOT_PERMITTED = dict.fromkeys(_ERRNO, "EPERM")
_UNTOUCHED = "not a Service: the address is used as it is"
_THIS_NODE = abi.constants()["SERVICE_THIS_NODE"]
_HOST_NETNS = abi.constants()["SERVICE_HOST_NETNS"]
_NODE_PORT = abi.constants()["SERVICE_NODE_PORT"]
_ANY_NODE = NODE | REMOTE_NODE | LOOPBACK
_WHOSE = (
    (NODE, "an address of this node"),
    (REMOTE_NODE, "an address of another node"),
    (LOOPBACK, "the loopback address"),
    (PASS, "an address at which nothing is refused"),
)


@dataclass(frozen=True, slots=True)
class Affinity:
    """What is remembered of the clients of one service port. `endpoint` is the one that the host's
    network namespace has now, "" if none; `clients` counts all namespaces that have a valid one."""

    seconds: int
    endpoint: str
    left_seconds: float
    clients: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """`errno` is what connect() or sendmsg() gives, "" if it goes through; `result` and `why` are
    a sentence each, `steps` what the programs look at, in that order. `notes` is what may be
    otherwise for other clients."""

    destination: str
    client: str
    verdict: str
    errno: str
    result: str
    why: str
    notes: tuple[str, ...]
    steps: tuple[str, ...]
    service: str
    frontend_id: int | None
    algorithm: str
    choice: tuple[str, ...]
    policy: PolicyRow | None
    affinity: Affinity | None
    endpoints: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A frontend that answers, with what it is to the client in words."""

    key: Frontend
    ident: int
    element: Element
    owner: PortName
    what: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class _Missed:
    """No frontend answers."""

    verdict: str
    result: str
    why: str
    service: str = ""
    ident: int | None = None


def parse_destination(text: str) -> Frontend:
    """ADDR:PORT or [ADDR]:PORT, then /tcp (the default) or /udp. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):([0-9]+)(?:/(\w+))?", text)
    if not match:
        raise ValueError(
            f"{text!r} is no ADDRESS:PORT[/PROTOCOL], such as 10.96.0.10:53/udp or [fd00::1]:80"
        )
    protocol = {"tcp": TCP, "udp": UDP}.get((match[4] or "tcp").lower())
    if protocol is None:
        raise ValueError(f"protocol {match[4]!r} is not translated; write tcp or udp")
    if int(match[3]) > 65535:
        raise ValueError(f"port {match[3]} is above 65535")
    if match[2] and match[2].count(".") != 3:
        raise ValueError(f"{match[2]!r} is no IP address; a name has first to be resolved")
    return Frontend(to_address(match[1] or match[2]), int(match[3]), protocol)


def explain(
    reader: Reader,
    destination: Frontend,
    client: str = HOST,
    now: int = 0,
    *,
    tells_why: bool = True,
) -> Explanation:
    """Follows `find_destination` of bpf/lookup.h and `choose` of bpf/affinity.h for this address,
    port and protocol. `client` is HOST or ELSEWHERE, `now` CLOCK_MONOTONIC in ns. `tells_why`:
    whether this kernel's programs choose the error of what they refuse, or it is always EPERM."""
    walk = _Walk(reader, destination, client, _ERRNO if tells_why else _NOT_PERMITTED)
    found = walk.find()
    notes = walk.notes()
    if isinstance(found, _Missed):
        return Explanation(
            destination=str(destination),
            client=client,
            verdict=found.verdict,
            errno=walk.errno.get(found.verdict, ""),
            result=found.result,
            why=found.why,
            notes=notes,
            steps=tuple(walk.steps),
            service=found.service,
            frontend_id=found.ident,
            algorithm="",
            choice=(),
            policy=None,
            affinity=None,
            endpoints=(),
        )
    return _of_service(walk, found, notes, now)


def _of_service(walk: _Walk, found: _Found, notes: tuple[str, ...], now: int) -> Explanation:
    reader, destination, steps = walk.reader, walk.destination, walk.steps
    element, owner = found.element, found.owner
    service = str(owner) if owner != UNKNOWN else f"owner {element.owner}, which has no name"
    policy = policy_row(reader, element, reader.policies())
    more = choice_words(element.algorithm, policy)
    algorithm = algorithm_name(element.algorithm)
    chosen_by = ", ".join((algorithm, *more))
    sticky = f", client affinity {element.affinity} s" if element.affinity else ""
    steps.append(f"service {found.ident}: belongs to {service}, algorithm {chosen_by}{sticky}")
    what = f"{found.what} of {service}{found.where}" if found.what else service
    verdict, why = TRANSLATED, f"{destination} is {what}, which chooses by {chosen_by}"
    candidates: tuple[Candidate, ...] = ()
    remembered: Affinity | None = None
    if not element.count:
        empty = empty_name(element.first)
        steps.append(f"set: empty, which means {empty}")
        verdict = UNREACHABLE if empty == "unreachable" else REFUSED
        lacks = "no endpoints under its policy" if verdict == UNREACHABLE else "no endpoints"
        result = f"{walk.errno[verdict]}: service has {lacks}"
        why = f"{destination} is {what}, whose set is empty"
    else:
        slots = reader.slots(element.first, element.count)
        where = f"slot {element.first}"
        if element.count > 1:
            where = f"slots {element.first} to {element.first + element.count - 1}"
        steps.append(f"set: {_plural(element.count, 'endpoint')}, {where}")
        kept = ""
        if element.affinity:
            remembered = _affinity(reader, element, destination.address, slots, now)
            steps.append(_affinity_step(remembered, walk.client))
            kept = remembered.endpoint if walk.client == HOST else ""
        if policy:
            steps.append(f"policy: {policy}")
        client = walk.settings["host_netns"] if walk.client == HOST else 0
        chosen = choice(reader, element, slots, client, kept, now)
        candidates = chosen.candidates
        steps += chosen.steps
        steps += [candidate_step(c, element.first + i) for i, c in enumerate(candidates)]
        if kept and remembered:
            result = f"{_who(destination)} gets {kept}, the endpoint that this client has"
            why = f"{destination} is {what}, which keeps a client's endpoint; this one for "
            why += f"{remembered.left_seconds:.0f} s more, each new connection prolongs it"
        else:
            result = outcome(chosen, element.algorithm, _who(destination), walk.errno[REFUSED])
            if chosen.nobody:
                verdict = REFUSED
            elif element.affinity:
                why += f" and then keeps a client's endpoint for {element.affinity} s"
            if missing := element.count - len(slots):
                steps.append(f"{_plural(missing, 'slot')} beyond the end of the map")
                result += f"; {missing} in {element.count} fail with {walk.errno[REFUSED]}: "
                result += "no such slot"
    if remembered:
        notes = (*notes, _others(remembered, walk.client))
    return Explanation(
        destination=str(destination),
        client=walk.client,
        verdict=verdict,
        errno=walk.errno.get(verdict, ""),
        result=result,
        why=why,
        notes=notes,
        steps=tuple(steps),
        service=str(owner) if owner != UNKNOWN else "",
        frontend_id=found.ident,
        algorithm=algorithm,
        choice=more,
        policy=policy,
        affinity=remembered,
        endpoints=candidates,
    )


class _Walk:
    """From a destination to a service, noting each step."""

    def __init__(
        self, reader: Reader, destination: Frontend, client: str, errno: Mapping[str, str]
    ) -> None:
        self.reader = reader
        self.destination = destination
        self.client = client
        self.errno = errno
        self.steps: list[str] = []
        self.settings = reader.settings()
        self.names = reader.names()

    def notes(self) -> tuple[str, ...]:
        found = []
        if skipped := self.settings["skipped"]:
            what = "network namespace that is" if skipped == 1 else "network namespaces that are"
            found.append(
                f"sockets of the {skipped} {what} opted out are not translated, whatever is "
                "said here"
            )
        if self.client == HOST and not self.settings["host_netns"]:
            found.append(
                "the agent has not said which network namespace is the host's: to the programs "
                "every process is a pod's"
            )
        return tuple(found)

    @property
    def _in_host(self) -> bool:
        return self.client == HOST and bool(self.settings["host_netns"])

    def find(self) -> _Found | _Missed:
        """`find_destination`: the exact key, then what the address is as a whole."""
        key = self.destination
        if not self.reader.marked(key.address):
            self.steps.append(f"marks: no frontend has the address {to_text(key.address)}")
            return self._unknown_address(key.address)
        found = self._lookup(key)
        if found is None:
            return self._by_address()
        ident, element = found
        if element.flags & _NODE_PORT:
            self.steps.append(f"service {ident}: is found by way of a node's address only")
            return self._by_address()
        owner = self._owner(element)
        if element.flags & _HOST_NETNS and not self._in_host:
            self.steps.append(f"service {ident}: is for the host's network namespace only")
            why = f"{key} is {owner}, for processes in the host's network namespace only"
            return _Missed(NOT_A_SERVICE, _UNTOUCHED, why, str(owner), ident)
        what = "the hostPort" if owner.service.startswith(POD) else ""
        return _Found(key, ident, element, owner, what)

    def _lookup(self, key: Frontend) -> tuple[int, Element] | None:
        """`find_service`: the service's own key has the last word."""
        ident = self.reader.find(key)
        if ident is None:
            self.steps.append(f"frontends: no key {key}")
            return None
        self.steps.append(f"frontends: key {key} leads to service {ident}")
        try:
            element = self.reader.service(ident)
        except IndexError:
            self.steps.append(f"service {ident}: outside of the map, so the key counts as absent")
            return None
        if element.frontend != key:
            self.steps.append(
                f"service {ident}: its own key is {element.frontend}, so the key counts as absent"
            )
            return None
        self.steps.append(f"service {ident}: its own key is the same")
        return ident, element

    def _owner(self, element: Element) -> PortName:
        return self.names.get(element.owner, UNKNOWN)

    def _by_address(self) -> _Found | _Missed:
        """`find_by_address`."""
        address = self.destination.address
        folded = fold(address)
        if folded != address:
            self.steps.append(f"{to_text(address)}: looked up as {to_text(folded)}")
        found = self._lookup(Frontend(folded, 0, 0))
        if found is None:
            return self._unknown_address(address)
        ident, element = found
        if not element.flags:
            return self._undefined_port(ident, element)
        self.steps.append(f"service {ident}: flags {flags_text(element.flags)}")
        whose = _whose(element.flags)
        if not element.flags & _ANY_NODE:
            why = f"{to_text(address)} is {whose}"
            return _Missed(NOT_A_SERVICE, _UNTOUCHED, why, ident=ident)
        return self._node_port(ident, element.flags, whose)

    def _unknown_address(self, address: Address) -> _Missed:
        text = to_text(address)
        cidrs = [cidr for cidr in self.settings["cidrs"] if _within(address, *cidr)]
        if cidrs:
            cidr = cidr_text(*cidrs[0])
            self.steps.append(f"settings: unused addresses of {cidr} are refused")
            result = f"{self.errno[REFUSED]}: no Service has the address {text}"
            why = f"{text} is in the service CIDR {cidr}, and the agent was told to refuse what "
            return _Missed(REFUSED, result, why + "no Service uses there")
        why = f"{text} is the address of no Service and of no node"
        return _Missed(NOT_A_SERVICE, _UNTOUCHED, why)

    def _undefined_port(self, ident: int, element: Element) -> _Missed:
        key, owner = self.destination, self._owner(element)
        address = to_text(key.address)
        service = f"{owner.namespace}/{owner.service}" if owner != UNKNOWN else ""
        result = f"{self.errno[REFUSED]}: no Service defines port {_port_text(key)} of {address}"
        why = f"{address} is the ClusterIP of {service or 'a Service'}, which has no "
        why += f"port {key.port}/{PROTOCOL_NAMES[key.protocol]}"
        return _Missed(REFUSED, result, why, service, ident)

    def _node_port(self, wildcard: int, flags: int, whose: str) -> _Found | _Missed:
        """`find_node_port`: nodes have ports of their own, so nothing is refused here."""
        destination = self.destination
        address, port = to_text(destination.address), _port_text(destination)
        if flags & LOOPBACK and not self._in_host:
            self.steps.append("loopback: another one in each network namespace but the host's")
            why = f"a pod's {address} is its own: NodePorts are there for the host's processes only"
            return _Missed(NOT_A_SERVICE, _UNTOUCHED, why, ident=wildcard)
        key = destination._replace(address=ANY_IPV4 if is_ipv4(destination.address) else ANY_IPV6)
        found = self._lookup(key)
        if found is None:
            why = f"{address} is {whose}, and no Service has the NodePort {port}"
            return _Missed(NOT_A_SERVICE, _UNTOUCHED, why, ident=wildcard)
        ident, element = found
        owner = self._owner(element)
        kind = "hostPort" if owner.service.startswith(POD) else "NodePort"
        if flags & REMOTE_NODE and element.flags & _THIS_NODE:
            self.steps.append(f"service {ident}: holds at the addresses of this node only")
            reason = (
                "that node knows its own Pods"
                if kind == "hostPort"
                else "its externalTrafficPolicy is Local, so that node decides"
            )
            why = f"{address} is {whose}, and the {kind} {port} of {owner} holds on this node "
            return _Missed(NOT_A_SERVICE, _UNTOUCHED, f"{why}only: {reason}", str(owner), ident)
        return _Found(key, ident, element, owner, f"the {kind}", f" at {whose}")


def _within(address: Address, network: Address, mask: Address) -> bool:
    as_number = (int.from_bytes(part, "big") for part in (address, network, mask))
    number, base, bits = as_number
    return number & bits == base


def _whose(flags: int) -> str:
    return next((words for flag, words in _WHOSE if flags & flag), f"flags {flags}")


def _port_text(key: Frontend) -> str:
    return str(key.port) if key.protocol == TCP else f"{key.port}/udp"


def _affinity(
    reader: Reader, element: Element, address: Address, slots: Iterable[Slot], now: int
) -> Affinity:
    """`known_endpoint` of bpf/affinity.h: an entry holds until its time is over, and as long as
    its endpoint is in the set."""
    family = 4 if is_ipv4(address) else 6
    host = reader.settings()["host_netns"]
    members = {slot.backend for slot in slots}
    endpoint, left, clients = "", 0.0, 0
    for raw_key, raw in reader.items("affinity"):
        key, entry = decode_affinity(raw_key, raw)
        backend = entry["addr"], entry["port"]
        rest = element.affinity - max(now - entry["seen"], 0) / 1e9
        here = (key["owner"], key["family"]) == (element.owner, family)
        if not here or rest < 0 or backend not in members:
            continue
        clients += 1
        if host and key["netns"] == host:
            endpoint, left = endpoint_text(*backend), round(rest, 1)
    return Affinity(element.affinity, endpoint, left, clients)


def _affinity_step(found: Affinity, client: str) -> str:
    if client != HOST:
        return f"affinity: {_plural(found.clients, 'client')} with an endpoint, each has its own"
    if not found.endpoint:
        return "affinity: the host's network namespace has no endpoint that is still valid"
    return (
        f"affinity: the host's network namespace has {found.endpoint}, "
        f"{found.left_seconds:.0f} s left"
    )


def _others(found: Affinity, client: str) -> str:
    others = found.clients - (client == HOST and bool(found.endpoint))
    who = "other network namespaces" if client == HOST else "network namespaces"
    return (
        f"each network namespace is a client of its own: {others} {who} have an endpoint now, "
        "see 'pointsman get affinity'"
    )


def _who(destination: Frontend) -> str:
    return "a connection" if destination.protocol == TCP else "a socket"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
