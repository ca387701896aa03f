"""Damaged packets: nothing but the intended bytes may change, whatever comes.

Seeds are fixed, and POINTSMAN_FUZZ_SEED, POINTSMAN_FUZZ_PACKETS try others. Beside each verdict
stands an oracle that knows the packet formats by itself, and nothing of flows: it says which bytes
of a frame are addresses, ports, checksums or TTL, and whether the checksums are right.
"""

from __future__ import annotations

import os
import random

import pytest
from scapy.packet import Packet

from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node
from tests.kernel.packets.oracle import shape_of
from tests.kernel.packets.test_errors import error, segment
from tests.kernel.packets.test_fragments import pieces
from tests.kernel.packets.world import (
    EMPTY,
    FAMILIES,
    FAR,
    IN_RANGE,
    LOCAL,
    MANY,
    NONE_LOCAL,
    REMOTE,
    TARGET,
    V6,
    Family,
    arriving,
    tagged,
)
from tests.support.packets import DROP, PASS, SEND

SEED = int(os.environ.get("POINTSMAN_FUZZ_SEED", "20240611"))
PACKETS = int(os.environ.get("POINTSMAN_FUZZ_PACKETS", "3000"))


def corpus(f: Family) -> list[bytes]:
    """Whole packets of every kind that the programs know."""
    client = (f.client, IN_RANGE)
    data = bytes(range(64))
    found: list[Packet] = []
    for port in (REMOTE, LOCAL, FAR, EMPTY, NONE_LOCAL, MANY, 22):
        found += [
            f.tcp(client, (f.node, port)),
            f.tcp(client, (f.node, port), "PA", data),
            f.tcp(client, (f.node, port), "FA"),
            f.udp(client, (f.node, port), data),
            f.udp(client, (f.node, port), data[:5]),
        ]
    found += [
        f.tcp((f.remote, TARGET), (f.node, IN_RANGE), "SA"),
        f.udp((f.remote, TARGET), (f.node, IN_RANGE), data),
        f.tcp((f.local, TARGET), (f.client, IN_RANGE), "SA"),
        f.udp((f.local, TARGET), (f.client, IN_RANGE), data),
        *pieces(f.udp(client, (f.node, REMOTE), bytes(2500)), f),
        *pieces(f.udp(client, (f.node, LOCAL), bytes(2500)), f),
    ]
    for kind in ("unreachable", "too big", "time exceeded"):
        ours = segment(f, (f.node, IN_RANGE), (f.remote, TARGET))
        theirs = segment(f, (f.node, REMOTE), client)
        here = segment(f, (f.node, LOCAL), client)
        found += [
            error(f, kind, f.router, f.node, bytes(ours), 60),
            error(f, kind, f.router, f.node, bytes(ours)[:68], 60),
            error(f, kind, f.router, f.node, bytes(theirs), 60),
            error(f, kind, f.router, f.node, bytes(here), 60),
        ]
    frames = [arriving(packet) for packet in found]
    return [bytes(frame) for frame in (*frames, *(tagged(frame) for frame in frames[:10]))]


def damaged(frame: bytes, random_: random.Random) -> bytes:
    """Bits turned, bytes written, taken out or put in, the end cut off; mostly in the headers."""
    data = bytearray(frame)
    for _ in range(random_.choice((0, 1, 1, 1, 2, 3, 8))):
        headers = min(len(data), random_.choice((14, 34, 54, 74, 120, 2000)))
        at = random_.randrange(max(1, headers))
        what = random_.randrange(8)
        if what < 3:
            data[at] ^= 1 << random_.randrange(8)
        elif what < 5:
            data[at] = random_.choice((0, 1, 4, 6, 17, 44, 58, 60, 0x40, 0x45, 0x60, 0x7F, 0xFF))
        elif what == 5:
            data = data[: max(14, random_.randrange(len(data)))]
        elif what == 6:
            data[at:at] = random_.randbytes(random_.choice((1, 2, 4, 8, 40)))
        else:
            del data[at : at + random_.choice((1, 2, 4, 8))]
        if len(data) < 14:
            data += bytes(14 - len(data))
    return bytes(data)


def judge(before: bytes, after: bytes, verdict: str, hook: str) -> None:
    """What came out is what went in, but for what a translation changes."""
    if verdict == DROP or before == after:
        return
    was, now = shape_of(before), shape_of(after)
    assert was is not None, "a packet that makes no sense was changed"
    assert now is not None, "it makes no sense any more"
    if was.is_answered_by(now):
        assert verdict == SEND
        assert not now.errors.get("ip")
        assert not now.errors["l4"]
        return
    assert len(before) == len(after), "its length changed"
    changed = {i for i in range(len(before)) if before[i] != after[i]}
    if verdict == SEND:
        changed -= set(range(14))  # the link-layer header is another one on its way out
    assert not changed - was.changeable, f"bytes {sorted(changed - was.changeable)} changed"
    assert was.errors == now.errors, "a checksum was not amended by what changed"
    if verdict == PASS and hook == XDP:
        assert before[was.ttl] == after[was.ttl], "TTL of what the stack goes on with"


def fuzz(node: Node, f: Family, hook: str, seed: int, count: int) -> None:
    random_ = random.Random(f"{seed} {f} {hook}")
    frames = corpus(f)
    for frame in frames:
        node.lab.run(frame, hook)
    for number in range(count):
        frame = damaged(random_.choice(frames), random_)
        outcome = node.offer(frame, hook)
        if outcome is None:
            continue
        assert outcome.verdict in (PASS, DROP, SEND), f"{outcome.code}: packet {number}"
        try:
            judge(frame, outcome.frame, outcome.verdict, hook)
        except AssertionError as error_:
            raise AssertionError(
                f"{error_}; seed {seed}, packet {number}, verdict {outcome.verdict} "
                f"({outcome.code})\n in {frame.hex()}\nout {outcome.frame.hex()}"
            ) from None


@pytest.mark.parametrize("hook", [XDP, INGRESS, EGRESS])
@pytest.mark.parametrize("f", FAMILIES, ids=repr)
def test_damaged_packets_change_nowhere_else(node: Node, f: Family, hook: str) -> None:
    print(f"seed {SEED}, {PACKETS} packets")
    fuzz(node, f, hook, SEED, PACKETS)


@pytest.mark.parametrize("hook", [XDP, INGRESS, EGRESS])
def test_noise_passes_untouched(node: Node, hook: str) -> None:
    random_ = random.Random(f"{SEED} noise {hook}")
    for _ in range(500):
        head = random_.choice((b"\x08\x00", b"\x86\xdd", b"\x81\x00", random_.randbytes(2)))
        frame = random_.randbytes(12) + head + random_.randbytes(random_.randrange(200))
        outcome = node.offer(frame, hook)
        assert outcome is None or (outcome.verdict, outcome.frame) == (PASS, frame)


def test_the_oracle_knows_the_corpus() -> None:
    """Every whole packet has a shape, and right checksums if it is all there."""
    for f in FAMILIES:
        for frame in corpus(f):
            shape = shape_of(frame)
            assert shape is not None, frame.hex()
            whole = len(frame) < 1000 and not shape.quoted
            assert not whole or not any(shape.errors.values()), (frame.hex(), shape.errors)


def test_the_oracle_sees_damage() -> None:
    frame = bytearray(bytes(arriving(V6.udp((V6.client, 1), (V6.node, 2), b"payload"))))
    frame[-1] ^= 1
    shape = shape_of(bytes(frame))
    assert shape is not None
    assert shape.errors["l4"]
