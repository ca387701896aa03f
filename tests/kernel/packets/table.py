"""The table that tests are written in: what comes, what goes out, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scapy.packet import Packet

from tests.kernel.packets.node import XDP, Node
from tests.kernel.packets.world import FAMILIES, Family
from tests.support.packets import PASS

Build = Callable[[Family], Packet]


@dataclass(frozen=True, slots=True)
class Came:
    """A packet that came by before, through this program on this device."""

    build: Build
    hook: str = "xdp_ingress"
    device: str = "eth0"


@dataclass(frozen=True, slots=True)
class Case:
    """`packet` goes through `hook` after all of `given`; None in `becomes` means: untouched."""

    name: str
    packet: Build
    verdict: str = PASS
    becomes: Build | None = None
    given: tuple[Came, ...] = ()
    hook: str = "xdp_ingress"
    device: str = "eth0"
    counts: Mapping[str, int] = field(default_factory=dict)
    families: tuple[Family, ...] = FAMILIES
    link: bool = True  # whether the link-layer header is compared, too

    def run(self, node: Node, f: Family) -> None:
        for came in self.given:
            node.send(came.build(f), came.hook, came.device)
        frame = bytes(self.packet(f))
        wanted = frame if self.becomes is None else bytes(self.becomes(f))
        before = node.lab.counts()
        outcome = node.lab.run(frame, self.hook, self.device)
        after = node.lab.counts()
        moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        assert outcome.verdict == self.verdict, f"{outcome.code}, counted {moved}"
        # What is sent by TC gets its link-layer header later.
        skip = 0 if self.link and not (outcome.verdict == "send" and self.hook != XDP) else 14
        if outcome.verdict != "drop":
            same_frame(outcome.frame[skip:], wanted[skip:])
        for name, number in self.counts.items():
            assert moved.get(name, 0) == number, moved


def same_frame(got: bytes, wanted: bytes) -> None:
    """Byte for byte; the difference is told by place."""
    if got == wanted:
        return
    places = [i for i in range(min(len(got), len(wanted))) if got[i] != wanted[i]]
    told = ", ".join(f"{i}: {got[i]:02x} for {wanted[i]:02x}" for i in places[:24])
    raise AssertionError(
        f"{len(got)} bytes for {len(wanted)}; {told or 'the same so far'}\n"
        f"got    {got.hex()}\nwanted {wanted.hex()}"
    )
