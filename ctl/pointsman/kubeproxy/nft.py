"""kube-proxy's tables as `nft --json list table ip kube-proxy` shows them. Pure.

Names of chains tell only which Service something is of; what is served, and to whom, is what the
rules and their maps of verdicts say.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pointsman.kubeproxy import rules
from pointsman.kubeproxy.answers import CLUSTER_IP, DROP, EXTERNAL, NODE_PORT, REJECT, Target
from pointsman.kubeproxy.rules import Condition, Lookup, Rule, Ruleset, Verdict
from pointsman.ranges import Source, parse
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOLS,
    Address,
    Frontend,
    to_address,
)

TABLE = "kube-proxy"
_PERHAPS = Condition(rules.PERHAPS)
_WORDS = {"return": rules.RETURN, "accept": rules.ACCEPT, "drop": DROP, "reject": REJECT}
#: Statements that decide nothing.
_PASSING = frozenset({"mangle", "counter", "log", "masquerade", "notrack"})
_FIELDS = {"saddr": rules.SOURCE, "daddr": rules.ADDRESS, "dport": rules.PORT}
_NUMBERS = {name.lower(): number for name, number in PROTOCOLS.items()}


class _NotUnderstood(ValueError):
    """A part of a rule in words that are not known here."""


def parse_tables(text: str, local: frozenset[Address], *, ipv6: bool) -> Ruleset | None:
    """One family's table, None if there is none, or nothing in it. Raises ValueError for what is
    no listing of nft."""
    family = "ip6" if ipv6 else "ip"
    table = _Table()
    try:
        for entry in json.loads(text)["nftables"]:
            for kind, what in entry.items():
                if kind in ("set", "map", "chain", "rule") and (
                    what.get("family"),
                    what.get("table"),
                ) == (family, TABLE):
                    getattr(table, f"add_{kind}")(what)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no listing of 'nft --json': {error!r}") from None
    if not table.rules:
        return None
    hooks = {hook: [name for _, name in sorted(found)] for hook, found in table.hooks.items()}
    chains = {
        name: [_read(table, name, rule) for rule in listed] for name, listed in table.rules.items()
    }
    found = Ruleset(chains, hooks, (), local)
    found.found = tuple(_targets(table, chains, ANY_IPV6 if ipv6 else ANY_IPV4))
    return found


@dataclass
class _Table:
    """As listed; what elements mean is read where a rule refers to them."""

    sets: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    maps: dict[str, list[Any]] = field(default_factory=dict)
    rules: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    hooks: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    #: What elements of maps say of themselves: the comment, by key.
    comments: dict[Any, str] = field(default_factory=dict)

    def add_set(self, what: Mapping[str, Any]) -> None:
        self.sets[what["name"]] = what

    def add_map(self, what: Mapping[str, Any]) -> None:
        self.maps[what["name"]] = what.get("elem", [])

    def add_chain(self, what: Mapping[str, Any]) -> None:
        self.rules.setdefault(what["name"], [])
        if "hook" in what:
            self.hooks.setdefault(what["hook"], []).append((int(what.get("prio", 0)), what["name"]))

    def add_rule(self, what: Mapping[str, Any]) -> None:
        self.rules.setdefault(what["chain"], []).append(what)


# -- what is served ------------------------------------------------------------------------------


def _targets(
    table: _Table, chains: Mapping[str, list[Rule]], any_address: Address
) -> Iterator[Target]:
    """The keys of each map of verdicts that is asked with a port and protocol."""
    seen: set[Frontend] = set()
    cluster_ips = _cluster_ips(table)
    for rule in (rule for listed in chains.values() for rule in listed):
        lookup = rule.verdict
        if not isinstance(lookup, Lookup) or not {rules.PORT, rules.PROTOCOL} <= {*lookup.fields}:
            continue
        for key, verdict in lookup.elements.items():
            parts = dict(zip(lookup.fields, key, strict=True))
            address = parts.get(rules.ADDRESS, any_address)
            frontend = Frontend(address, parts[rules.PORT], parts[rules.PROTOCOL])
            if frontend in seen:
                continue
            seen.add(frontend)
            kind = CLUSTER_IP if address in cluster_ips else EXTERNAL
            kind = NODE_PORT if rules.ADDRESS not in parts else kind
            yield Target(frontend, kind, _service(verdict.chain) or table.comments.get(key, ""))


def _cluster_ips(table: _Table) -> set[Any]:
    """Empty if they are not understood: then all addresses are as external ones."""
    with contextlib.suppress(ValueError):
        return {_scalar(_key(each)) for each in table.sets.get("cluster-ips", {}).get("elem", ())}
    return set()


def _service(chain: str) -> str:
    """service-ULMVA6XW-shop/web/tcp/http → shop/web:http."""
    parts = chain.split("-", 2)[-1].split("/") if chain.count("-") >= 2 else []
    if len(parts) != 4:
        return ""
    return f"{parts[0]}/{parts[1]}:{parts[3]}".removesuffix(":")


# -- one rule ------------------------------------------------------------------------------------


def _read(table: _Table, chain: str, what: Mapping[str, Any]) -> Rule:
    """Statements in their order; one that is not understood leaves open whether the rest holds."""
    conditions: list[Condition] = []
    unknown: list[str] = []
    verdict: tuple[Verdict, ...] | Lookup = ()
    affinity = 0
    for statement in what.get("expr", ()):
        try:
            ((kind, of),) = statement.items()
            if kind == "match":
                conditions += _conditions(table, of)
            elif kind == "vmap":
                verdict = _vmap(table, of)
            elif kind == "set":
                affinity = int(table.sets.get(_name(of["set"]), {}).get("timeout", 0))
            elif kind == "dnat":
                verdict = _dnat(of)
            elif kind not in _PASSING:
                verdict = (_verdict(statement),)
        except (ValueError, LookupError, TypeError, AttributeError):
            unknown.append(json.dumps(statement))
            conditions.append(_PERHAPS)
    why = f"chain {chain}: {', '.join(unknown)}" if unknown else ""
    return Rule(tuple(conditions), verdict, affinity, what.get("comment", ""), why)


def _verdict(what: Mapping[str, Any]) -> Verdict:
    ((kind, of),) = what.items()
    if kind in ("jump", "goto"):
        return Verdict(rules.JUMP if kind == "jump" else rules.GOTO, of["target"])
    if kind in _WORDS:
        return Verdict(_WORDS[kind])
    raise _NotUnderstood(kind)


def _vmap(table: _Table, what: Mapping[str, Any]) -> tuple[Verdict, ...] | Lookup:
    data = what["data"]
    elements = data["set"] if isinstance(data, dict) else table.maps[_name(data)]
    if "numgen" in what["key"]:
        return tuple(_verdict(value) for _, value in elements)
    parts = what["key"].get("concat", [what["key"]])
    found = {}
    for raw, value in elements:
        key = tuple(_scalar(part) for part in _concat(_key(raw)))
        found[key] = _verdict(value)
        if isinstance(raw, dict) and "comment" in raw.get("elem", {}):
            table.comments[key] = raw["elem"]["comment"]
    return Lookup(tuple(_field(part) for part in parts), found)


def _dnat(what: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """To one address, or to one of a map by chance."""
    if isinstance(what["addr"], str):
        pairs = [(what["addr"], what.get("port", 0))]
    else:
        mapping = what["addr"]["map"]
        if "numgen" not in mapping["key"]:
            raise _NotUnderstood("a map of addresses")
        pairs = [tuple(_concat(_key(value))) for _, value in mapping["data"]["set"]]
    return tuple(Verdict(rules.DNAT, backend=(to_address(a), int(p))) for a, p in pairs)


def _conditions(table: _Table, what: Mapping[str, Any]) -> Iterator[Condition]:
    """ "tcp dport 80" asks for the protocol, too."""
    protocol = what["left"].get("payload", {}).get("protocol")
    if protocol in _NUMBERS:
        yield Condition(rules.PROTOCOL, (_NUMBERS[protocol],))
    yield _condition(table, what)


def _condition(table: _Table, what: Mapping[str, Any]) -> Condition:
    left, right, op = what["left"], what["right"], what["op"]
    if "ct" in left and left["ct"]["key"] == "state":
        states = right.get("set", ()) if isinstance(right, dict) else right
        return Condition(rules.ALWAYS if "new" in states else rules.NEVER)
    if op not in ("==", "!=", "in"):
        raise _NotUnderstood(op)
    negated = op == "!="
    if "fib" in left:
        if right != "local" or left["fib"]["result"] != "type":
            raise _NotUnderstood("fib")
        source = "saddr" in left["fib"]["flags"]
        return Condition(rules.SOURCE_TYPE if source else rules.ADDRESS_TYPE, (), negated)
    if "meta" in left and left["meta"]["key"] in ("iifname", "iif"):
        return Condition(rules.NEVER, (), negated)  # how pods' packets are known; ours are not
    name = _field(left)
    if isinstance(right, str) and right.startswith("@"):
        listed = table.sets[_name(right)]
        if "dynamic" in listed.get("flags", ()) or "timeout" in listed:
            return _PERHAPS  # what a client did before
        values = listed.get("elem", [])
    else:
        values = right["set"] if isinstance(right, dict) and "set" in right else [right]
    found = [_value(name, _key(each)) for each in values]
    if name not in (rules.SOURCE, rules.ADDRESS):
        return Condition(name, tuple(found), negated)
    members = frozenset(address for address, bits in found if bits == 128)
    return Condition(name, tuple(each for each in found if each[1] < 128), negated, members)


def _value(name: str, value: Any) -> Any:
    if name in (rules.SOURCE, rules.ADDRESS):
        return _source(value)
    if name == rules.PORT:
        first, last = value["range"] if isinstance(value, dict) else (value, value)
        return int(first), int(last)
    return _scalar(value)


def _source(value: Any) -> Source:
    if isinstance(value, dict):
        prefix = value["prefix"]
        return parse(f"{prefix['addr']}/{prefix['len']}")
    if "/" in value:
        return parse(value)
    return to_address(value), 128


def _field(what: Mapping[str, Any]) -> str:
    ((kind, of),) = what.items()
    if kind == "meta" and of["key"] == "l4proto":
        return rules.PROTOCOL
    if kind == "payload" and of.get("field") in _FIELDS:
        return _FIELDS[of["field"]]
    raise _NotUnderstood(str(what))


def _name(text: str) -> str:
    return text.removeprefix("@")


def _key(what: Any) -> Any:
    """Without its comment."""
    return what["elem"]["val"] if isinstance(what, dict) and "elem" in what else what


def _concat(what: Any) -> list[Any]:
    return list(what["concat"]) if isinstance(what, dict) and "concat" in what else [what]


def _scalar(value: Any) -> Any:
    """A number, a protocol's number, or an address."""
    if isinstance(value, int):
        return value
    if isinstance(value, str) and value in _NUMBERS:
        return _NUMBERS[value]
    if isinstance(value, str):
        return to_address(value)
    raise _NotUnderstood(str(value))
