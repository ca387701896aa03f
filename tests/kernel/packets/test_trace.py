"""Events of decisions: each is read, or counted as lost. (What `pointsman trace` makes of them:
tests/kernel/test_trace.py.)"""

from __future__ import annotations

import contextlib

from pointsman import abi
from pointsman.packetmaps import now
from pointsman.tracing import Tracer
from tests.kernel.packets.node import Node
from tests.kernel.packets.world import IN_RANGE, LOCAL, V4, arriving


def test_what_finds_no_room_is_counted_as_lost(node: Node) -> None:
    with contextlib.closing(Tracer(node.lab.programs.parent / "maps")) as tracer:
        packet = bytes(arriving(V4.udp((V4.client, IN_RANGE), (V4.node, LOCAL))))
        node.lab.configure(trace_until=now() + 600 * 10**9)
        before = node.lab.counts()
        node.lab.run(packet)  # begins the flow: two decisions
        size = node.lab.map("trace").info.max_entries
        sent = size // abi.layouts()["event"].size + 100
        for _ in range(sent - 1):
            node.lab.run(packet)
        events = 0
        while read := tracer.events():
            events += len(read)
        lost = tracer.lost()
        assert lost > 100
        assert events + lost == sent + 1
        assert node.lab.counts()["TRACE_LOST"] - before["TRACE_LOST"] == lost
        # With room again nothing more is lost.
        node.lab.run(packet)
        assert [event.verdict for event in tracer.events()] == ["packet_here"]
        assert tracer.lost() == lost


def test_nothing_is_lost_where_nobody_traces(node: Node) -> None:
    packet = bytes(arriving(V4.udp((V4.client, IN_RANGE), (V4.node, LOCAL))))
    before = node.lab.counts()["TRACE_LOST"]
    for _ in range(100):
        node.lab.run(packet)
    assert node.lab.counts()["TRACE_LOST"] == before
