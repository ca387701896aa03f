"""kube-proxy's nftables rules, followed for one packet: a small interpreter of `nft --json`.

The rules themselves are walked, hook by hook, and not only kube-proxy's maps, so that what they
mean for a client of this node comes out: short-circuits, source ranges, drops of unused addresses.
Where `numgen random` chooses, every choice is followed. What is not known raises, rather than being
passed over. netfilter's order: nft(8), "Address families" and "Chains".
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from tests.cluster.compare.answers import (
    ALONE,
    DROP,
    ENDPOINTS,
    HOST,
    REJECT,
    Answer,
    Target,
    join,
)

TABLE = "kube-proxy"
#: Where loadBalancerSourceRanges are asked for.
FIREWALL = "firewall-check"
_FAMILIES = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class Packet:
    """The first one of a connection. `affinity`: seconds of the set that was updated with it."""

    source: str
    target: Target
    affinity: int = 0
    translated: bool = False


#: What became of it: dropped, rejected, accepted, or it goes on: to the next rule, or after the end
#: of a chain to where the chain was jumped to.
Outcome = tuple[str, Packet]
_ON, _ENDED, _ACCEPTED = "goes on", "chain ended", "accepted"
_WORDS = {
    "continue": _ON,
    "return": _ENDED,
    "accept": _ACCEPTED,
    "drop": DROP,
    "reject": REJECT,
}


@dataclass
class _Family:
    sets: dict[str, frozenset[str]] = field(default_factory=dict)
    timeouts: dict[str, int] = field(default_factory=dict)
    maps: dict[str, dict[Any, Any]] = field(default_factory=dict)
    rules: dict[str, list[list[dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    base: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))


class Ruleset:
    """The tables of one node. `local`: the addresses that this node has, without loopback;
    `sources`: one of a pod's and one of the host's for each family, by client."""

    def __init__(
        self, listed: list[Any], local: Iterable[str], sources: dict[tuple[str, int], str]
    ) -> None:
        self._local = frozenset(local)
        self._sources = sources
        self.families = {"ip": _Family(), "ip6": _Family()}
        for entry in listed:
            for kind, what in entry.items():
                if kind in _READERS and what["table"] == TABLE:
                    _READERS[kind](self.families[what["family"]], what)

    def targets(self) -> set[tuple[str, int, str]]:
        """Address, port and protocol of every map; the address "" for NodePorts of IPv4, "::" for
        those of IPv6, port 0 for a ClusterIP as a whole."""
        found: set[tuple[str, int, str]] = set()
        for name, family in self.families.items():
            for mapping in ("service-ips", "no-endpoint-services"):
                found |= {(a, port, proto) for a, proto, port in family.maps.get(mapping, ())}
            for mapping in ("service-nodeports", "no-endpoint-nodeports"):
                any_ = "::" if name == "ip6" else ""
                found |= {(any_, port, proto) for proto, port in family.maps.get(mapping, ())}
            found |= {(address, 0, "") for address in family.sets.get("cluster-ips", ())}
        return found

    def ask(self, client: str, target: Target, *, without: str = "") -> Answer:
        """`without` is a chain that is passed over."""
        family = self.families[_FAMILIES[target.family]]
        walk = _Walk(family, self._is_local, without)
        start = Packet(self._sources[client, target.family], target)
        outcomes = walk.hook("output" if client == HOST else "prerouting", start)
        return _answer(each(outcomes, lambda p: walk.hook(self._second_hook(client, p), p)))

    def _second_hook(self, client: str, packet: Packet) -> str:
        """After translation; "" for what leaves the host's own namespace."""
        if self._is_local(packet.target.address):
            return "input"
        return "" if client == HOST else "forward"

    def _is_local(self, address: str) -> bool:
        return address in self._local or address == "::1" or address.startswith("127.")


def _answer(outcomes: set[Outcome]) -> Answer:
    ends = {what for what, _ in outcomes}
    packets = [packet for _, packet in outcomes]
    if ends == {_ON} and len({packet.translated for packet in packets}) == 1:
        if not packets[0].translated:
            return Answer(ALONE)
        (affinity,) = {packet.affinity for packet in packets}
        endpoints = frozenset(join(p.target.address, p.target.port) for p in packets)
        return Answer(ENDPOINTS, endpoints, affinity)
    if len(ends) == 1:
        return Answer(ends.pop())
    raise ValueError(f"kube-proxy does one thing or another: {outcomes}")


def each(outcomes: set[Outcome], go: Callable[[Packet], set[Outcome]]) -> set[Outcome]:
    """What becomes of those that go on."""
    found: set[Outcome] = set()
    for what, packet in outcomes:
        found |= go(packet) if what == _ON else {(what, packet)}
    return found


class _Walk:
    """One packet on its way."""

    def __init__(self, family: _Family, is_local: Callable[[str], bool], without: str) -> None:
        self._family = family
        self._is_local = is_local
        self._without = without

    def hook(self, name: str, packet: Packet) -> set[Outcome]:
        """All base chains of a hook, by priority; a drop is the end, an accept is of one chain."""
        outcomes: set[Outcome] = {(_ON, packet)}
        for _, chain in sorted(self._family.base[name]):
            outcomes = each(outcomes, partial(self.chain, chain))
            outcomes = {(_ON if w in (_ENDED, _ACCEPTED) else w, p) for w, p in outcomes}
        return outcomes

    def chain(self, name: str, packet: Packet) -> set[Outcome]:
        """Never `_ON`: `_ENDED` if no rule decided."""
        if name == self._without:
            return {(_ENDED, packet)}
        outcomes: set[Outcome] = {(_ON, packet)}
        for rule in self._family.rules[name]:
            outcomes = each(outcomes, partial(self._rule, rule))
        return {(_ENDED if what == _ON else what, p) for what, p in outcomes}

    def _rule(self, rule: list[dict[str, Any]], packet: Packet) -> set[Outcome]:
        outcomes: set[Outcome] = {(_ON, packet)}
        for statement in rule:
            ((kind, what),) = statement.items()
            if kind == "match":
                if not self._matches(what, packet):
                    return {(_ON, packet)}
            elif kind == "vmap":
                verdicts = self._looked_up(what, packet)
                outcomes = {o for v in verdicts for o in self._verdict(v, packet)}
            elif kind == "set":
                timeout = self._family.timeouts[what["set"].removeprefix("@")]
                packet = replace(packet, affinity=timeout)
                outcomes = {(_ON, packet)}
            elif kind == "dnat":
                outcomes = set(self._translated(what, packet))
            elif kind in ("mangle", "counter"):
                continue
            else:
                outcomes = self._verdict(statement, packet)
        return outcomes

    def _verdict(self, verdict: dict[str, Any], packet: Packet) -> set[Outcome]:
        ((kind, what),) = verdict.items()
        if kind == "jump":
            found = self.chain(what["target"], packet)
            return {(_ON if w == _ENDED else w, p) for w, p in found}
        if kind == "goto":
            return self.chain(what["target"], packet)
        if kind in _WORDS:
            return {(_WORDS[kind], packet)}
        raise NotImplementedError(f"the verdict {verdict}")

    def _looked_up(self, what: dict[str, Any], packet: Packet) -> list[dict[str, Any]]:
        """The verdicts of a vmap: none if the key is not there, all where chance decides."""
        data = what["data"]
        elements = _elements(data["set"]) if isinstance(data, dict) else self._map(data)
        if "numgen" in what["key"]:
            return _all_of(what["key"], elements)
        key = self._value(what["key"], packet)
        return [elements[key]] if key in elements else [{"continue": None}]

    def _translated(self, what: dict[str, Any], packet: Packet) -> Iterable[Outcome]:
        if isinstance(what["addr"], str):
            pairs = [(what["addr"], what["port"])]
        else:
            mapping = what["addr"]["map"]
            elements = _elements(mapping["data"]["set"])
            pairs = [_key(value) for value in _all_of(mapping["key"], elements)]
        for address, port in pairs:
            target = Target(address, port, packet.target.protocol)
            yield _ACCEPTED, replace(packet, target=target, translated=True)

    def _matches(self, what: dict[str, Any], packet: Packet) -> bool:
        left, right, op = what["left"], what["right"], what["op"]
        if "ct" in left:
            assert (left, op, right) == ({"ct": {"key": "state"}}, "in", "new"), what
            return True
        if "fib" in left:
            assert right == "local" and op == "==", what
            (flag,) = left["fib"]["flags"]
            return bool(self._is_local(packet.source if flag == "saddr" else packet.target.address))
        same = self._within(self._value(left, packet), right)
        return same if op == "==" else not same

    def _within(self, value: Any, right: Any) -> bool:
        if isinstance(right, str) and right.startswith("@"):
            return value in self._family.sets[right[1:]]
        if isinstance(right, dict) and "set" in right:
            return any(self._within(value, each) for each in right["set"])
        if isinstance(right, dict):
            return ipaddress.ip_address(value) in _network(**right["prefix"])
        return bool(value == right)

    def _map(self, name: str) -> dict[Any, Any]:
        return self._family.maps[name.removeprefix("@")]

    def _value(self, what: dict[str, Any], packet: Packet) -> Any:
        ((kind, of),) = what.items()
        if kind == "concat":
            return tuple(self._value(each, packet) for each in of)
        if kind == "meta" and of["key"] == "l4proto":
            return packet.target.protocol
        if kind == "payload" and of["field"] in ("saddr", "daddr", "dport"):
            target = packet.target
            fields = {"saddr": packet.source, "daddr": target.address, "dport": target.port}
            return fields[of["field"]]
        raise NotImplementedError(f"the expression {what}")


def _all_of(key: dict[str, Any], elements: dict[Any, Any]) -> list[Any]:
    """What chance may choose: there is something for each number."""
    numbers = range(key["numgen"]["mod"])
    assert set(elements) == set(numbers), f"{key} chooses from {sorted(elements)}"
    return [elements[number] for number in numbers]


@lru_cache(maxsize=256)
def _network(addr: str, len: int) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(f"{addr}/{len}")


def _key(what: Any) -> Any:
    """Without its comment; a concatenation as a tuple."""
    if isinstance(what, dict) and "elem" in what:
        what = what["elem"]["val"]
    return tuple(what["concat"]) if isinstance(what, dict) else what


def _elements(listed: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in listed}


def _read_set(family: _Family, what: dict[str, Any]) -> None:
    family.sets[what["name"]] = frozenset(_key(each) for each in what.get("elem", ()))
    family.timeouts[what["name"]] = what.get("timeout", 0)


def _read_map(family: _Family, what: dict[str, Any]) -> None:
    family.maps[what["name"]] = _elements(what.get("elem", []))


def _read_chain(family: _Family, what: dict[str, Any]) -> None:
    if "hook" in what:
        assert what["policy"] == "accept", what
        family.base[what["hook"]].append((what["prio"], what["name"]))


def _read_rule(family: _Family, what: dict[str, Any]) -> None:
    family.rules[what["chain"]].append(what["expr"])


_READERS = {"set": _read_set, "map": _read_map, "chain": _read_chain, "rule": _read_rule}
