"""What XDP did with a flow's last packet goes for the next ones, without a look at the flow: only
for plain packets, only for a moment, and never once the flow is another's."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from scapy.layers.inet import IP, IPOption
from scapy.packet import Packet

from tests.kernel.packets.node import ELSEWHERE, INGRESS, Node
from tests.kernel.packets.test_flows import endpoint_of
from tests.kernel.packets.world import (
    GATEWAY_MAC,
    IN_RANGE,
    REMOTE,
    TARGET,
    V4,
    VLAN,
    arriving,
    leaving,
    tagged,
)
from tests.support.packets import SEND, Outcome

_LIFE = 1.0  # WAY_LIFE
_STRANGER = "02:00:00:00:00:77"


def asks(data: bytes = b"again", **more: object) -> Packet:
    return V4.udp((V4.client, IN_RANGE), (V4.node, REMOTE), data, **more)


def acknowledges(flags: str = "A", **more: object) -> Packet:
    return V4.tcp((V4.client, IN_RANGE), (V4.node, REMOTE), flags, **more)


def answers(port: int = IN_RANGE, flags: str = "A") -> Packet:
    return V4.tcp((V4.remote, TARGET), (V4.node, port), flags)


def open_connection(node: Node) -> None:
    node.send(arriving(acknowledges("S")))
    node.send(arriving(answers(flags="SA")))
    for _ in range(5):
        node.send(arriving(acknowledges()))
        node.send(arriving(answers()))


def lose_flows(node: Node) -> None:
    for name in ("flows", "flows_new"):
        found = node.lab.map(name)
        for key in [key for key, _ in found.items()]:
            found.delete(key)


def remembered(
    node: Node, warm: Callable[[], object], packet: Packet, device: str = "eth0"
) -> tuple[Outcome, dict[str, int]]:
    """What becomes of the packet just after `warm`, with the flows away, and what is counted: what
    is sent now without FLOW_BEGUN is sent from memory. Tried again, for a machine may sleep longer
    than the memory lasts."""
    for _ in range(20):
        node.lab.forget()
        warm()
        began = time.monotonic()
        lose_flows(node)
        before = node.lab.counts()
        outcome = node.send(packet, device=device)
        after = node.lab.counts()
        if time.monotonic() - began < _LIFE / 2:
            return outcome, {n: after[n] - before[n] for n in after if after[n] != before[n]}
    raise AssertionError("the machine is too slow")


def query(node: Node) -> Callable[[], object]:
    return lambda: [node.send(arriving(asks())) for _ in range(5)]


def test_datagrams_are_sent_without_a_look_at_their_flow(node: Node) -> None:
    outcome, counted = remembered(node, query(node), arriving(asks(b"once more", ttl=9)))
    wanted = V4.udp((V4.node, IN_RANGE), (V4.remote, TARGET), b"once more", ttl=8)
    assert outcome.frame.hex() == bytes(leaving(wanted)).hex()
    assert counted == {"PACKET_FORWARDED": 1}


def test_so_are_both_directions_of_a_connection(node: Node) -> None:
    there, counted = remembered(node, lambda: open_connection(node), arriving(acknowledges()))
    wanted = V4.tcp((V4.node, IN_RANGE), (V4.remote, TARGET), "A", ttl=63)
    assert there.frame.hex() == bytes(leaving(wanted)).hex()
    assert counted == {"PACKET_FORWARDED": 1}
    back, counted = remembered(node, lambda: open_connection(node), arriving(answers()))
    wanted = V4.tcp((V4.node, REMOTE), (V4.client, IN_RANGE), "A", ttl=63)
    assert back.frame.hex() == bytes(leaving(wanted, GATEWAY_MAC)).hex()
    assert counted == {"PACKET_REPLIED": 1}


def test_options_of_ip_stay(node: Node) -> None:
    option = IPOption(bytes([0x07, 0x07, 0x04, 0, 0, 0, 0, 0]))
    outcome, _ = remembered(node, query(node), arriving(asks(options=[option])))
    wanted = V4.udp((V4.node, IN_RANGE), (V4.remote, TARGET), b"again", ttl=63, options=[option])
    assert outcome.frame.hex() == bytes(leaving(wanted)).hex()


def test_it_lasts_a_moment(node: Node) -> None:
    query(node)()
    lose_flows(node)
    time.sleep(_LIFE + 0.05)
    before = node.lab.counts()["FLOW_BEGUN"]
    node.send(arriving(asks()))
    assert node.lab.counts()["FLOW_BEGUN"] == before + 1


OTHERS = {
    "a SYN": lambda: arriving(acknowledges("S")),
    "a FIN": lambda: arriving(acknowledges("FA")),
    "an RST": lambda: arriving(acknowledges("R")),
    "the last hop": lambda: arriving(acknowledges(ttl=1)),
    "a tag": lambda: tagged(arriving(acknowledges()), VLAN),
    "another port": lambda: arriving(V4.tcp((V4.client, IN_RANGE + 1), (V4.node, REMOTE), "A")),
    "another client": lambda: arriving(V4.tcp((V4.stranger, IN_RANGE), (V4.node, REMOTE), "A")),
    "another address": lambda: arriving(V4.tcp((V4.client, IN_RANGE), (V4.node1, REMOTE), "A")),
    "another protocol": lambda: arriving(asks()),
    "too large": lambda: arriving(acknowledges(data=bytes(1480))),
    "a first fragment": lambda: arriving(acknowledges(flags="A", data=bytes(16))),
}


BEGIN = ("a SYN", "another protocol")


@pytest.mark.parametrize("name", OTHERS)
def test_not_for(node: Node, name: str) -> None:
    packet = OTHERS[name]()
    if name == "a first fragment":
        packet[IP].flags = "MF"
    _, counted = remembered(node, lambda: open_connection(node), packet)
    assert counted.get("PACKET_FORWARDED", 0) == counted.get("FLOW_BEGUN", 0) == (name in BEGIN)


def test_not_for_another_device(node: Node) -> None:
    _, counted = remembered(node, query(node), arriving(asks()), device="eth1")
    assert counted["FLOW_BEGUN"] == 1


def test_not_for_frames_that_were_sent_to_others(node: Node) -> None:
    frame = arriving(asks())
    frame.dst = _STRANGER
    _, counted = remembered(node, query(node), frame)
    assert counted.get("FLOW_BEGUN", 0) == 1, "the lab's devices are told no MAC and take any"


def test_not_for_an_endpoint_that_has_left(node: Node) -> None:
    query(node)()
    node.serve(V4, REMOTE, (V4.remote2, ELSEWHERE))
    assert endpoint_of(V4, node.send(arriving(asks()))) == V4.remote2


def test_connections_go_on_though_their_endpoint_has_left(node: Node) -> None:
    def opened() -> None:
        node.serve(V4, REMOTE, (V4.remote, ELSEWHERE))
        open_connection(node)
        node.serve(V4, REMOTE, (V4.remote2, ELSEWHERE))

    there, _ = remembered(node, opened, arriving(acknowledges()))
    assert endpoint_of(V4, there) == V4.remote


def test_what_follows_a_reset_is_noted(node: Node) -> None:
    """A client that sends on takes its RST back; else the flow would be over soon."""
    open_connection(node)
    node.send(arriving(acknowledges("R")))
    assert any("FLOW_RST" in flow.flags for flow in node.lab.flows())
    node.send(arriving(acknowledges("PA")))
    assert not any("FLOW_RST" in flow.flags for flow in node.lab.flows())


@pytest.mark.parametrize("hook", ["xdp_ingress", INGRESS])
def test_a_new_flow_of_the_same_tuple_is_not_sent_as_the_old_one(node: Node, hook: str) -> None:
    """Whichever program begins it, also where the old one was driven out of its map."""
    both = ((V4.remote, ELSEWHERE), (V4.remote2, ELSEWHERE))
    open_connection(node)
    lose_flows(node)
    node.serve(V4, REMOTE, (V4.remote2, ELSEWHERE), all=both)
    node.send(arriving(acknowledges("S")), hook)
    outcome = node.send(arriving(acknowledges()))
    assert outcome.verdict == SEND
    assert endpoint_of(V4, outcome) == V4.remote2


def test_a_port_that_goes_to_another_client_takes_its_answers_along(node: Node) -> None:
    node.lab.configure(first_port=61000, last_port=61000)
    for client in (IN_RANGE, IN_RANGE + 1, IN_RANGE + 2):
        for flags in ("S", "A", "A", "A", "A"):
            packet = V4.tcp((V4.client, client), (V4.node, REMOTE), flags)
            assert node.send(arriving(packet)).verdict == SEND
            outcome = node.send(arriving(answers(61000, "A")))
            wanted = V4.tcp((V4.node, REMOTE), (V4.client, client), ttl=63)
            assert outcome.frame[30:38].hex() == bytes(leaving(wanted))[30:38].hex()
        lose_flows(node)
