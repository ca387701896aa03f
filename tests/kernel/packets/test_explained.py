"""What `explain --from` says of a packet is what the programs do with it.

Services at random, packets at random, each explained from the maps and then given to the program;
flows and clients' endpoints build up meanwhile. POINTSMAN_FUZZ_SEED tries others.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections import Counter

import pytest

from pointsman import abi
from pointsman.explainpackets import (
    DROPPED,
    FORWARDED,
    PASSED,
    REFUSED,
    Client,
    PacketExplanation,
    explain_packet,
)
from pointsman.flows import SECOND
from pointsman.packetmaps import PacketMaps, now
from pointsman.values import TCP, UDP, Entry, Frontend, endpoint_text, to_address
from pointsman.view import View
from tests.kernel.packets.node import ELSEWHERE, HERE, INGRESS, XDP, Choice, Node, entries
from tests.kernel.packets.world import FAMILIES, Family, arriving
from tests.support.packetlab import tuple_key
from tests.support.packets import DROP, PASS

SEED = int(os.environ.get("POINTSMAN_FUZZ_SEED", "20240611"))
ROUNDS, PACKETS = 12, 150
_SOON = 10 * SECOND  # longer than a machine stands still
PORTS = range(32000, 32006)
_C = abi.constants()
_POLICIES = [_C["PACKETS_OUTSIDE"] | more for more in (0, _C["PACKETS_LOCAL"])]
_EMPTY = (0, _C["EMPTY_UNREACHABLE"])
_flow, _tuple = abi.layouts()["flow"], abi.layouts()["tuple"]


def service(f: Family, port: int, random_: random.Random) -> list[Entry]:
    """A NodePort, and the same with or without source ranges at a load balancer's address."""
    known = [(f.local, HERE), (f.far, ELSEWHERE), (f.guest, HERE)]
    known += [(f"{f.remote}{i}", ELSEWHERE) for i in range(4)]
    members = tuple(random_.sample(known, random_.choice((0, 0, 1, 2, 5))))
    flags = random_.choice(_POLICIES)
    choice = Choice(
        members, flags, random_.choice(_EMPTY), random_.choice((0, 600)), all=tuple(known)
    )
    limited = Choice(
        members,
        flags | random_.choice((0, _C["PACKETS_RANGES"])),
        choice.empty,
        choice.affinity,
        all=choice.all,
    )
    name = f"{f!r}-{port}".lower()
    return [*entries(f, name, port, choice, f.any), *entries(f, name, port, limited, f.vip)]


class Tried:
    """One packet: explained, then sent."""

    def __init__(self, node: Node, f: Family, hook: str, random_: random.Random) -> None:
        self._node, self._f, self._hook = node, f, hook
        self.protocol = random_.choice((TCP, UDP))
        self.client = (
            random_.choice((f.client, f.client, f.router, f.stranger)),
            random_.randrange(2000, 2030),
        )
        self.to = (
            random_.choice((f.node, f.node1, f.vip, f.vip, f.cluster_ip, f.unknown)),
            random_.choice((*PORTS, 22)),
        )
        self.flags = random_.choice(("S", "S", "S", "A", "PA", "SA", "FA", "R"))

    def explain(self, view: View, packets: PacketMaps, at: int) -> PacketExplanation:
        to = Frontend(to_address(self.to[0]), self.to[1], self.protocol)
        client = Client(to_address(self.client[0]), self.client[1])
        return explain_packet(view, packets, to, client, at, begins=self.flags == "S")

    def agree(self, said: PacketExplanation) -> str:
        """Sends it; what became of it in a word. Raises AssertionError if that was not said."""
        f, lab = self._f, self._node.lab
        make = f.tcp if self.protocol == TCP else f.udp
        more = {"flags": self.flags} if self.protocol == TCP else {}
        frame = bytes(arriving(make(self.client, self.to, **more)))
        before = lab.counts()
        outcome = lab.run(frame, self._hook)
        after = lab.counts()
        moved = {name for name in after if after[name] != before[name]}
        if said.remembered:
            assert "FLOW_BEGUN" not in moved
            assert self._endpoint() == said.remembered
            return "remembered"
        if said.verdict == PASSED:
            assert moved <= {"FLOW_MOVED"}
            assert (outcome.verdict, outcome.frame) == (PASS, frame)
        elif said.verdict == REFUSED:
            assert moved & {"PACKET_REFUSED", "DROP_ICMP_LIMIT"}
        elif said.verdict == DROPPED:
            assert said.counter.upper() in moved
            assert outcome.verdict == DROP
        else:
            assert "FLOW_BEGUN" in moved
            assert self._endpoint() == said.endpoint
        return said.verdict

    def _endpoint(self) -> str:
        """Where its flow goes."""
        key = tuple_key(self.client, self.to, self.protocol)
        for name in ("flows", "flows_new"):
            if value := self._node.lab.map(name).lookup(key):
                other = _flow.decode(value)["other"]
                found = other[0] if isinstance(other, list) else other
                port = int.from_bytes(struct.pack("=H", found["source_port"]), "big")
                return endpoint_text(found["source"], port)
        return ""

    def __str__(self) -> str:
        names = {TCP: f"TCP {self.flags}", UDP: "UDP"}
        return f"{names[self.protocol]} {self.client} > {self.to} at {self._hook}"


def decision(said: PacketExplanation) -> tuple[str, ...]:
    return said.verdict, said.counter, said.endpoint, said.remembered


def age(node: Node, random_: random.Random) -> None:
    """Some clients' endpoints expire, some flows fall silent for long, some lose a half."""
    clients = node.lab.map("affinity_clients")
    at = abi.layouts()["affinity"].field("seen").offset
    for key, value in list(clients.items()):
        if random_.random() < 0.3:
            aged = bytearray(value)
            struct.pack_into("=Q", aged, at, now() - 601 * 10**9)
            clients.update(key, bytes(aged))
    fresh = node.lab.map("flows_new")
    for key, value in list(fresh.items()):
        datagrams = key[_tuple.field("proto").offset] == UDP
        if datagrams and random_.random() < 0.2 and _flow.decode(value)["flags"] & _C["FLOW_REPLY"]:
            fresh.delete(key)
    node.lab.forget_recent()
    node.lab.age(random_.choice((0, 0, 5, 70)))


@pytest.mark.parametrize("hook", [XDP, INGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_what_is_explained_is_what_happens(node: Node, f: Family, hook: str) -> None:
    random_ = random.Random(f"{SEED} {f} {hook}")
    seen: Counter[str] = Counter()
    maps = node.lab.programs.parent / "maps"
    with contextlib.closing(PacketMaps(maps)) as packets:
        for _ in range(ROUNDS):
            for port in random_.sample(PORTS, 3):
                node.set(f"{f!r}-{port}".lower(), *service(f, port, random_))
            node.lab.configure(dsr=random_.choice((0, 0, 1)))
            age(node, random_)
            # An LRU map that fills takes what is explained.
            assert len(node.lab.flows()) < 0.9 * node.lab.map("flows_new").info.max_entries
            with contextlib.closing(View(maps)) as view:
                for _ in range(PACKETS):
                    tried = Tried(node, f, hook, random_)
                    at = now()
                    said = tried.explain(view, packets, at)
                    # What is about to expire may do so before the packet is there.
                    if decision(said) != decision(tried.explain(view, packets, at + _SOON)):
                        continue
                    try:
                        seen[tried.agree(said)] += 1
                    except AssertionError as error:
                        raise AssertionError(f"{error}; seed {SEED}: {tried}\n{said}") from None
    assert set(seen) == {"remembered", PASSED, REFUSED, DROPPED, FORWARDED}, seen
