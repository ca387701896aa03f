"""kube-proxy's rules as iptables-save and ip6tables-save show them. Pure.

The chains of kube-proxy begin with KUBE-; of the built-in chains only what leads to those is read,
so that nobody else's rules are taken for its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from pointsman.kubeproxy import rules
from pointsman.kubeproxy.answers import CLUSTER_IP, DROP, EXTERNAL, NODE_PORT, REJECT, Target
from pointsman.kubeproxy.rules import Condition, Rule, Ruleset, Verdict, exact
from pointsman.ranges import Source, parse
from pointsman.values import (
    ANY_IPV4,
    ANY_IPV6,
    PROTOCOLS,
    Address,
    Backend,
    Frontend,
    to_address,
)

PREFIX = "KUBE-"
#: Chains in which kube-proxy tells what it serves.
_SERVICES, _NODE_PORTS, _EXTERNAL = "KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES"
_TELLING = (_SERVICES, _NODE_PORTS, _EXTERNAL)
#: Chains of one Service port or endpoint.
_SERVING = re.compile(r"KUBE-(SVC|SVL|EXT|XLB|FW|SEP)-")
#: As iptables-save quotes: shlex understands more, and takes ten times as long.
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_HOOKS = {
    rules.PREROUTING: (("nat", "PREROUTING"),),
    rules.INPUT: (("filter", "INPUT"),),
    rules.FORWARD: (("filter", "FORWARD"),),
    rules.OUTPUT: (("nat", "OUTPUT"), ("filter", "OUTPUT")),
}
_NEVER = Condition(rules.NEVER)
_PERHAPS = Condition(rules.PERHAPS)
_VERDICTS = {"ACCEPT": rules.ACCEPT, "DROP": DROP, "REJECT": REJECT, "RETURN": rules.RETURN}
#: An old kube-proxy marks what kubelet's rules then drop.
_MARK_DROP = "KUBE-MARK-DROP"
#: What only does something to a packet that goes on, or to its log.
_PASSING = frozenset({"MARK", "CONNMARK", "LOG", "NFLOG", "MASQUERADE", "KUBE-MARK-MASQ"})
_NUMBERS = {name.lower(): number for name, number in PROTOCOLS.items()} | {
    str(number): number for number in PROTOCOLS.values()
}


def parse_save(text: str, local: frozenset[Address], *, ipv6: bool) -> Ruleset | None:
    """What a kube-proxy has programmed, None if there is nothing of one. Never raises: a rule that
    is not understood says so."""
    chains: dict[str, list[Rule]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            chains.setdefault(f"{table} {line[1:].split()[0]}", [])
        elif line.startswith("-A ") and table in ("nat", "filter"):
            name, rule = _rule(table, line, ipv6=ipv6)
            chains.setdefault(f"{table} {name}", []).append(rule)
    if f"nat {_SERVICES}" not in chains and f"filter {_SERVICES}" not in chains:
        return None
    hooks = {hook: [f"{t} {chain}" for t, chain in names] for hook, names in _HOOKS.items()}
    for names in hooks.values():
        for name in names:
            chains[name] = [rule for rule in chains.get(name, ()) if _is_kube_proxys(rule)]
    found = Ruleset(chains, hooks, (), local)
    found.found = tuple(_targets(chains, found.unknown, ANY_IPV6 if ipv6 else ANY_IPV4))
    return found


def _is_kube_proxys(rule: Rule) -> bool:
    verdict = rule.verdict
    return isinstance(verdict, tuple) and any(PREFIX in each.chain for each in verdict)


# -- what is served ------------------------------------------------------------------------------


def _targets(
    chains: dict[str, list[Rule]], unknown: set[str], any_address: Address
) -> Iterator[Target]:
    seen: set[Frontend] = set()
    for name, listed in chains.items():
        chain = name.partition(" ")[2]
        if chain not in _TELLING:
            continue
        for rule in listed:
            leads = _leads(rule)
            address, port, protocol = exact(rule)
            node_port = address is None and chain != _SERVICES
            if port is None or protocol is None or (address is None and not node_port):
                if leads == "Service" or (rule.unknown and leads):
                    unknown.add(rule.unknown or f"{name}: {rule.comment or 'a rule'}")
                continue
            frontend = Frontend(address or any_address, port, protocol)
            if leads and frontend not in seen:
                seen.add(frontend)
                words = rule.comment.split()
                # After the name: "cluster IP", "external IP", "loadbalancer IP" or none of them.
                outside = chain == _EXTERNAL or {"external", "loadbalancer"} & set(words)
                kind = NODE_PORT if node_port else EXTERNAL if outside else CLUSTER_IP
                yield Target(frontend, kind, words[0].removesuffix(":") if words else "")


def _leads(rule: Rule) -> str:
    """To a Service's chain, to a refusal, or ("") to neither."""
    for verdict in rule.verdict if isinstance(rule.verdict, tuple) else ():
        if _SERVING.search(verdict.chain):
            return "Service"
        if verdict.kind in (DROP, REJECT):
            return "refusal"
    return ""


# -- one rule ------------------------------------------------------------------------------------


def _rule(table: str, line: str, *, ipv6: bool) -> tuple[str, Rule]:
    words = [_unquoted(word) for word in _WORD.findall(line)]
    name, rest = words[1] if len(words) > 1 else "", words[2:]
    reading = _Reading(table, ipv6=ipv6)
    try:
        reading.read(rest)
    except (ValueError, IndexError) as error:
        reading.unknown.append(str(error))
    why = f"{line} ({', '.join(reading.unknown)})" if reading.unknown else ""
    rule = replace(reading.rule, conditions=tuple(reading.conditions), unknown=why)
    return name, rule


def _unquoted(word: str) -> str:
    return word[1:-1].replace("\\", "") if word[0] == word[-1] == '"' else word


class _Reading:
    """The words of one rule, one after the other."""

    def __init__(self, table: str, *, ipv6: bool) -> None:
        self.table, self._bits = table, 128 if ipv6 else 32
        self.rule = Rule()
        self.conditions: list[Condition] = []
        self.unknown: list[str] = []

    def read(self, words: list[str]) -> None:
        at = 0
        while at < len(words):
            negated = words[at] == "!"
            at += negated
            word = words[at]
            end = at + 1
            while end < len(words) and words[end] != "!" and not _is_option(words[end]):
                end += 1
            self._option(word, words[at + 1 : end], negated)
            at = end

    def _option(self, word: str, values: list[str], negated: bool) -> None:
        reader = _OPTIONS.get(word)
        if word in _MEANINGLESS:
            return
        if word in ("-j", "-g", "--jump", "--goto"):
            self._target(values[0], jump=word in ("-j", "--jump"))
        elif word == "--to-destination":
            verdict = Verdict(rules.DNAT, backend=_backend(values[0]))
            self.rule = replace(self.rule, verdict=(verdict,))
        elif word == "--comment":
            self.rule = replace(self.rule, comment=" ".join(values))
        elif word == "--seconds":
            self.rule = replace(self.rule, affinity=int(values[0]))
        elif word in ("-s", "-d"):
            field = rules.SOURCE if word == "-s" else rules.ADDRESS
            ranges = tuple(self._source(value) for value in values[0].split(","))
            self.conditions.append(Condition(field, ranges, negated))
        elif reader:
            condition = reader(values)
            self.conditions.append(replace(condition, negated=condition.negated != negated))
        else:
            self.unknown.append(" ".join([word, *values]))
            self.conditions.append(_PERHAPS)

    def _target(self, target: str, *, jump: bool) -> None:
        verdict: tuple[Verdict, ...] = ()
        if target in _VERDICTS:
            verdict = (Verdict(_VERDICTS[target]),)
        elif target == _MARK_DROP:
            verdict = (Verdict(DROP),)
        elif target.startswith(PREFIX) and target not in _PASSING:
            verdict = (Verdict(rules.JUMP if jump else rules.GOTO, f"{self.table} {target}"),)
        elif target not in _PASSING and target != "DNAT":
            self.unknown.append(f"-j {target}")
        self.rule = replace(self.rule, verdict=verdict)

    def _source(self, text: str) -> Source:
        return parse(text if "/" in text else f"{text}/{self._bits}")


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not word[1].isdigit()


def _backend(text: str) -> Backend:
    """10.0.0.1:80 or [fd00::1]:80; without a port that stays."""
    address, _, port = text.rpartition(":")
    if text.startswith("["):
        address, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif not address:
        address, port = text, ""
    return to_address(address), int(port or 0)


def _protocol(values: list[str]) -> Condition:
    number = _NUMBERS.get(values[0])
    # Others are of nothing that is asked for.
    return Condition(rules.PROTOCOL, (number,)) if number else _NEVER


def _ports(values: list[str]) -> Condition:
    found = []
    for text in values[0].split(","):
        first, _, last = text.partition(":")
        found.append((int(first or 0), int(last or first or 65535)))
    return Condition(rules.PORT, tuple(found))


def _type(field: str) -> Callable[[list[str]], Condition]:
    def read(values: list[str]) -> Condition:
        return Condition(field) if values == ["LOCAL"] else _PERHAPS

    return read


def _state(values: list[str]) -> Condition:
    """Of a packet that begins a connection."""
    return Condition(rules.ALWAYS if "NEW" in values[0].split(",") else rules.NEVER)


def _chance(_values: list[str]) -> Condition:
    return _PERHAPS


def _never(_values: list[str]) -> Condition:
    return _NEVER


#: Conditions that stand alone, by option.
_OPTIONS: dict[str, Callable[[list[str]], Condition]] = {
    "-p": _protocol,
    "--dport": _ports,
    "--dports": _ports,
    "--src-type": _type(rules.SOURCE_TYPE),
    "--dst-type": _type(rules.ADDRESS_TYPE),
    "--ctstate": _state,
    "--state": _state,
    "--probability": _chance,
    "--rcheck": _chance,
    "--mark": _chance,
    # How kube-proxy knows pods' packets; none of ours is one.
    "-i": _never,
    "--physdev-in": _never,
    "--physdev-is-in": _never,
}
#: Options that decide nothing here: what loads a module, and what belongs to an option above.
_MEANINGLESS = frozenset(
    {
        *("-m", "--mode", "--reap", "--name", "--mask", "--rsource", "--rdest", "--set"),
        *("--set-xmark", "--set-mark", "--or-mark", "--and-mark", "--random", "--random-fully"),
        *("--persistent", "--reject-with", "--log-prefix", "--nfacct-name"),
    }
)
