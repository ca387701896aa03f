"""Rules of netfilter, in whichever language they were written, followed for one packet. Pure.

iptables.py and nft.py make them. Rules are walked, hook by hook, rather than guessed from the names
of chains, so that what they mean for a client comes out. Where chance decides, or what a client
did before, or something that is not understood, both ways are followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pointsman.kubeproxy.answers import (
    ALONE,
    DROP,
    ENDPOINTS,
    REJECT,
    Answer,
    Client,
    Target,
)
from pointsman.ranges import Source, holds, parse
from pointsman.values import Address, Backend, Frontend, endpoint_text

#: Fields of a packet. `SOURCE_TYPE` and `ADDRESS_TYPE` are of the node's own addresses or not.
SOURCE, ADDRESS, PORT, PROTOCOL = "source", "address", "port", "protocol"
SOURCE_TYPE, ADDRESS_TYPE = "source type", "address type"
#: Conditions that no field decides: one is always met, one never, of one nobody knows.
ALWAYS, NEVER, PERHAPS = "always", "never", "perhaps"
JUMP, GOTO, RETURN, ACCEPT, DNAT = "jump", "goto", "return", "accept", "dnat"
#: The hooks by which a first packet comes: see nft(8), "Address families".
PREROUTING, INPUT, FORWARD, OUTPUT = "prerouting", "input", "forward", "output"
#: Chains with the loadBalancerSourceRanges of one Service port, in both languages.
_FIREWALL = re.compile(r"KUBE-FW-|^firewall-(?!check$)")
#: A chain that is shorter is read faster than its index.
_SHORT = 8
_LOOPBACK = (parse("127.0.0.0/8"), parse("::1/128"))


@dataclass(frozen=True, slots=True)
class Condition:
    """`values` are Sources of SOURCE and ADDRESS, (first, last) of PORT, numbers of PROTOCOL.
    `members` are single addresses beside them, of which there may be thousands."""

    field: str
    values: tuple[Any, ...] = ()
    negated: bool = False
    members: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """`chain` of JUMP and GOTO, `backend` of DNAT."""

    kind: str
    chain: str = ""
    backend: Backend | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """A map of verdicts, and the fields its keys are made of."""

    fields: tuple[str, ...]
    elements: Mapping[tuple[Any, ...], Verdict]


@dataclass(frozen=True, slots=True)
class Rule:
    """With several verdicts chance chooses; with none it goes on. `affinity`: seconds for which
    the client is remembered. `unknown` is what is not understood of it, "" if all is."""

    conditions: tuple[Condition, ...] = ()
    verdict: tuple[Verdict, ...] | Lookup = ()
    affinity: int = 0
    comment: str = ""
    unknown: str = ""


class _Packet(NamedTuple):
    client: Client
    target: Frontend
    affinity: int = 0
    translated: bool = False


#: What became of it: the kind of a verdict, or that a chain came to its end without one.
_Outcome = tuple[str, _Packet]
_ON, _ENDED = "goes on", "ended"


class _Chain:
    """Rules, found by the address or port that they are for."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._addresses: dict[Address, list[int]] = {}
        self._ports: dict[int, list[int]] = {}
        self._others: list[int] = []
        if len(rules) < _SHORT:
            return
        for number, rule in enumerate(rules):
            address, port, _ = exact(rule)
            if address is not None:
                self._addresses.setdefault(address, []).append(number)
            elif port is not None:
                self._ports.setdefault(port, []).append(number)
            else:
                self._others.append(number)

    def rules(self, target: Frontend) -> Iterable[Rule]:
        """In their order; without those that are for something else."""
        if len(self._rules) < _SHORT:
            return self._rules
        numbers = (
            self._addresses.get(target.address, [])
            + self._ports.get(target.port, [])
            + self._others
        )
        return [self._rules[number] for number in sorted(numbers)]


def exact(rule: Rule) -> tuple[Address | None, int | None, int | None]:
    """The one address, port and protocol that a rule is for, None where it is for more."""
    address = port = protocol = None
    for each in rule.conditions:
        if each.negated or len(each.values) != 1:
            continue
        (value,) = each.values
        if each.field == ADDRESS and value[1] == 128:
            address = value[0]
        elif each.field == PORT and value[0] == value[1]:
            port = value[0]
        elif each.field == PROTOCOL:
            protocol = value
    return address, port, protocol


@dataclass
class Ruleset:
    """The rules of one family. `hooks` are the chains that stand at a hook, in their order; `found`
    is what they serve; `local` are this node's addresses."""

    chains: Mapping[str, Sequence[Rule]]
    hooks: Mapping[str, Sequence[str]]
    found: Sequence[Target]
    local: frozenset[Address] = frozenset()
    #: Rules that a walk met and that are not understood, as they are written.
    unknown: set[str] = field(default_factory=set)
    #: The chains of the last walks, until somebody empties it.
    walked: set[str] = field(default_factory=set)
    asks_who: bool = True
    _chains: dict[str, _Chain] = field(default_factory=dict)

    def targets(self) -> Sequence[Target]:
        return self.found

    def ask(self, client: Client, frontend: Frontend) -> Answer:
        outcomes = self._hook(OUTPUT if client.here else PREROUTING, _Packet(client, frontend))
        return _answer(_each(outcomes, lambda p: self._hook(self._second_hook(p), p)))

    def ranges(self, client: Client, frontend: Frontend) -> set[Source]:
        """The clients that the firewall of this frontend tells apart."""
        self.walked.clear()
        self.ask(client, frontend)
        return {
            source
            for name in self.walked
            if _FIREWALL.search(name)
            for rule in self.chains.get(name, ())
            for each in rule.conditions
            if each.field == SOURCE
            for source in (*each.values, *((address, 128) for address in each.members))
        }

    def _second_hook(self, packet: _Packet) -> str:
        if packet.translated:
            return ""  # what kube-proxy filters is what it did not translate
        if self._is_local(packet.target.address):
            return INPUT
        return "" if packet.client.here else FORWARD

    def _is_local(self, address: Address) -> bool:
        return address in self.local or holds(_LOOPBACK, address)

    def _hook(self, name: str, packet: _Packet) -> set[_Outcome]:
        """All chains of a hook; a drop is the end, an accept is of one chain."""
        outcomes: set[_Outcome] = {(_ON, packet)}
        for chain in self.hooks.get(name, ()):
            outcomes = _each(outcomes, partial(self._chain, chain))
            outcomes = {(_ON if w in (_ENDED, ACCEPT) else w, p) for w, p in outcomes}
        return outcomes

    def _chain(self, name: str, packet: _Packet, depth: int = 0) -> set[_Outcome]:
        """Never `_ON`: `_ENDED` if no rule decided."""
        if depth > 16:  # netfilter refuses loops; a text may have one
            self.unknown.add(f"{name}: chains that lead to each other without an end")
            return {(_ENDED, packet)}
        if name not in self._chains:
            self._chains[name] = _Chain(self.chains.get(name, ()))
        self.walked.add(name)
        going, found = {packet}, set[_Outcome]()
        for rule in self._chains[name].rules(packet.target):
            for each in list(going):
                met = self._all_met(rule, each)
                if met is False:
                    continue
                outcomes = self._outcomes(rule, each, depth)
                if met:
                    going.discard(each)
                going.update(p for what, p in outcomes if what == _ON)
                found.update(outcome for outcome in outcomes if outcome[0] != _ON)
            if not going:
                return found
        return found | {(_ENDED, each) for each in going}

    def _all_met(self, rule: Rule, packet: _Packet) -> bool | None:
        """None if nobody knows."""
        found: bool | None = True
        for condition in rule.conditions:
            met = self._met(condition, packet)
            if met is False:
                return False
            found = None if met is None else found
        return found

    def _outcomes(self, rule: Rule, packet: _Packet, depth: int) -> set[_Outcome]:
        """Of a rule whose conditions are met."""
        if rule.unknown:
            self.unknown.add(rule.unknown)
        if rule.affinity:
            packet = packet._replace(affinity=rule.affinity)
        verdicts: tuple[Verdict, ...]
        if isinstance(rule.verdict, Lookup):
            key = tuple(_value(name, packet) for name in rule.verdict.fields)
            found = rule.verdict.elements.get(key)
            verdicts = (found,) if found else ()
        else:
            verdicts = rule.verdict
        if not verdicts:
            return {(_ON, packet)}
        return {outcome for each in verdicts for outcome in self._verdict(each, packet, depth)}

    def _verdict(self, verdict: Verdict, packet: _Packet, depth: int) -> set[_Outcome]:
        if verdict.kind == JUMP:
            found = self._chain(verdict.chain, packet, depth + 1)
            return {(_ON if what == _ENDED else what, p) for what, p in found}
        if verdict.kind == GOTO:
            return self._chain(verdict.chain, packet, depth + 1)
        if verdict.kind == RETURN:
            return {(_ENDED, packet)}
        if verdict.kind == DNAT and verdict.backend:
            address, port = verdict.backend
            target = Frontend(address, port or packet.target.port, packet.target.protocol)
            return {(ACCEPT, packet._replace(target=target, translated=True))}
        return {(verdict.kind, packet)}

    def _met(self, condition: Condition, packet: _Packet) -> bool | None:
        name = condition.field
        if name == PERHAPS:
            return None
        if name in (ALWAYS, NEVER):
            found = name == ALWAYS
        elif name in (SOURCE, ADDRESS):
            value = _value(name, packet)
            found = value in condition.members or holds(condition.values, value)
        elif name == PORT:
            found = any(first <= packet.target.port <= last for first, last in condition.values)
        elif name == SOURCE_TYPE:
            found = packet.client.here or self._is_local(packet.client.address)
        elif name == ADDRESS_TYPE:
            found = self._is_local(packet.target.address)
        else:
            found = packet.target.protocol in condition.values
        return found != condition.negated


def _value(name: str, packet: _Packet) -> Any:
    if name == SOURCE:
        return packet.client.address
    return getattr(packet.target, name)


def _each(outcomes: set[_Outcome], go: Callable[[_Packet], set[_Outcome]]) -> set[_Outcome]:
    """What becomes of those that go on."""
    found: set[_Outcome] = set()
    for what, packet in outcomes:
        found |= go(packet) if what == _ON else {(what, packet)}
    return found


def _answer(outcomes: set[_Outcome]) -> Answer:
    """A client that may get an endpoint gets one: what refuses it otherwise is chance, or a rule of
    which nobody knows."""
    translated = [packet for _, packet in outcomes if packet.translated]
    if translated:
        affinity = max(packet.affinity for packet in translated)
        backends = {(packet.target.address, packet.target.port) for packet in translated}
        return Answer(ENDPOINTS, frozenset(endpoint_text(*b) for b in backends), affinity)
    kinds = {what for what, _ in outcomes}
    for verdict in (REJECT, DROP):
        if verdict in kinds:
            return Answer(verdict)
    return Answer(ALONE)
