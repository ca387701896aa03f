"""The pieces of many datagrams on two CPUs at a time: each goes on once, one way or the other."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import Counter

import pytest

from tests.kernel.packets.back import Back
from tests.kernel.packets.node import INGRESS, Node
from tests.kernel.packets.test_fragments import pieces, query
from tests.kernel.packets.world import LOCAL, V6, arriving
from tests.support.packets import DROP, test_run

DATAGRAMS = 1500
_IDENT = 14 + 40 + 4  # of the fragment header in a frame
_TAKEN, _UNTOUCHED, _ON = 1, 2, 3


class _Pair:
    """Two processes on two CPUs, in step by datagram, and what became of each piece."""

    def __init__(self, program: int, device: int, frames: list[list[bytes]]) -> None:
        self._program, self._device, self._frames = program, device, frames
        self._shared = mmap.mmap(-1, 128 + 4 * len(frames))

    def run(self, *pieces_of: tuple[int, ...]) -> None:
        child = os.fork()
        if not child:
            try:
                self._side(1, pieces_of[1])
            finally:
                os._exit(0)
        before = os.sched_getaffinity(0)
        self._side(0, pieces_of[0])
        os.sched_setaffinity(0, before)
        os.waitpid(child, 0)

    def _side(self, side: int, numbers: tuple[int, ...]) -> None:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[side]})
        for at, frames in enumerate(self._frames):
            struct.pack_into("=I", self._shared, side * 64, at + 1)
            end = time.monotonic() + 60
            while self._at(1 - side) <= at and time.monotonic() < end:
                pass
            for number in numbers:
                outcome = test_run(self._program, frames[number], self._device, xdp=False)
                became = _UNTOUCHED if outcome.frame == frames[number] else _ON
                self._shared[128 + 4 * at + number] = _TAKEN if outcome.verdict == DROP else became

    def _at(self, side: int) -> int:
        return int(struct.unpack_from("=I", self._shared, side * 64)[0])

    def became(self, at: int, number: int) -> int:
        return self._shared[128 + 4 * at + number]


def _as_number(frame: bytes, number: int) -> bytes:
    return frame[:_IDENT] + struct.pack("!I", number) + frame[_IDENT + 4 :]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
@pytest.mark.parametrize("sides", [((0,), (1, 2)), ((2, 0), (1,)), ((1,), (2, 0))], ids=str)
def test_no_piece_is_lost_and_none_comes_twice(
    node: Node, back: Back, sides: tuple[tuple[int, ...], ...]
) -> None:
    template = [bytes(arriving(piece)) for piece in pieces(query(V6, LOCAL), V6)]
    frames = [[_as_number(frame, at + 1) for frame in template] for at in range(DATAGRAMS)]
    pair = _Pair(node.lab.program(INGRESS), node.lab.devices["eth0"], frames)
    node.lab.on_node(pair.run, *sides)
    ways = [[pair.became(at, number) for number in range(3)] for at in range(DATAGRAMS)]
    given_back = Counter(back.frames(sum(way.count(_TAKEN) for way in ways)))
    assert not any(_UNTOUCHED in way for way in ways)
    for datagram, way in zip(frames, ways, strict=True):
        for frame, became in zip(datagram, way, strict=True):
            assert given_back[frame] == (became == _TAKEN)
