"""Both proxies of a node asked everything that either knows of, and the differences sorted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Self

import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.compare.answers import CLIENTS, HOST, POD, Answer, Target, plain
from tests.cluster.compare.choices import Case, choice_of
from tests.cluster.compare.facts import Facts
from tests.cluster.compare.nft import Ruleset
from tests.cluster.compare.ours import Maps
from tests.cluster.network import POD_CIDRS

#: A port that nothing has: what an address does as a whole.
UNUSED = 9
_PROTOCOLS = ("tcp", "udp", "sctp")
_LOOPBACK = {4: ("127.0.0.1", "127.3.2.1"), 6: ("::1",)}
#: Of a service CIDR, in the part of which the API server gives nothing by itself, and of nobody.
_NOBODYS = ("10.96.0.254", "fd00:96::fe", "203.0.113.99", "2001:db8:ff::99")


class Sides:
    """The agent and the kube-proxy of one node, as they are now. A context manager."""

    def __init__(self, cluster: Cluster, node: str, *, refuses_unused: bool) -> None:
        self.name = node
        self.refuses_unused = refuses_unused
        here = cluster.nodes[node]
        self.primary = {4: here.addresses.v4, 6: here.addresses.v6}
        shown = cluster.lab.run(["ip", "-json", "addr", "show"], here.place).stdout
        self.local = frozenset(
            plain(address["local"]) for link in json.loads(shown) for address in link["addr_info"]
        )
        site = here.site
        # The last addresses of the node's range: no pod has them.
        sources = {
            (HOST, 4): here.addresses.v4,
            (HOST, 6): here.addresses.v6,
            (POD, 4): site.gateway.v4.rpartition(".")[0] + ".254",
            (POD, 6): site.gateway.v6.rpartition(":")[0] + ":fe",
        }
        assert sources[POD, 4].startswith("10.244.") and len(POD_CIDRS) == 2
        self.ruleset = Ruleset(cluster.proxy(node).rules(), self.local, sources)
        self.maps = Maps(cluster.agent(node).root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.maps.__exit__()

    def ours(self, client: str, target: Target) -> Answer:
        return self.maps.ask(client, target)

    def theirs(self, client: str, target: Target, *, without: str = "") -> Answer:
        return self.ruleset.ask(client, target, without=without)

    def targets(self, facts: Facts) -> set[Target]:
        """Every address and port that an object or one of them has something to say of."""
        nodes = {*self.local, *facts.of_others(self.name)}
        found = {Target(a, UNUSED, p) for a in (*_NOBODYS, *nodes) for p in _PROTOCOLS}
        for address, port, protocol in (
            self.ruleset.targets() | self.maps.targets() | facts.targets()
        ):
            if address in ("", "::"):
                family = 6 if address else 4
                at = {a for a in nodes if (6 if ":" in a else 4) == family}
                if port:
                    found |= {Target(a, port, protocol) for a in {*at, *_LOOPBACK[family]}}
            elif port:
                found.add(Target(address, port, protocol))
            else:
                found |= {Target(address, UNUSED, each) for each in _PROTOCOLS}
        return found


class Compared(NamedTuple):
    """`unmeant` are differences that no choice explains, `asked` counts answers by our verdict,
    `meant` differences by choice."""

    unmeant: list[Case]
    asked: Counter[str]
    meant: Counter[str]

    def text(self, most: int = 40, objects: int = 3) -> str:
        """The first ones, then the objects that the first addresses are about."""
        lines = [f"{len(self.unmeant)} differences that nobody meant"]
        lines += [_text(case) for case in self.unmeant[:most]]
        for case in list({case.target.address: case for case in self.unmeant}.values())[:objects]:
            about = yaml.safe_dump_all(case.facts.about(case.target), sort_keys=False)
            lines.append(f"# {case.target}\n{about}")
        return "\n".join(lines)


def compare(sides: Sides, facts: Facts) -> Compared:
    result = Compared([], Counter(), Counter())
    for case in _cases(sides, facts):
        result.asked[case.ours.verdict] += 1
        if case.ours == case.theirs:
            continue
        if choice := choice_of(case):
            result.meant[choice.name] += 1
        else:
            result.unmeant.append(case)
    return result


def _cases(sides: Sides, facts: Facts) -> Iterator[Case]:
    for target in sorted(sides.targets(facts)):
        for client in CLIENTS:
            ours, theirs = sides.ours(client, target), sides.theirs(client, target)
            yield Case(sides, facts, client, target, ours, theirs)


def _text(case: Case) -> str:
    return (
        f"{case.target} from a {case.client} client on {case.sides.name}\n"
        f"  pointsman:  {case.ours}\n  kube-proxy: {case.theirs}"
    )
