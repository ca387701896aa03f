"""What a program gives back to a device, so that it comes there again."""

from __future__ import annotations

import contextlib
import socket
import time

from tests.kernel.packets.node import INGRESS, Node
from tests.support.packets import Outcome

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33


class Back:
    """What is given back to a device: it comes again, where nothing of this lab serves it."""

    def __init__(self, node: Node, device: str = "eth0", kind: int = socket.PACKET_HOST) -> None:
        self._node, self._kind = node, kind
        self._tap = node.lab.on_node(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        node.lab.on_node(self._tap.bind, (device, _ETH_P_ALL))
        self._tap.setblocking(False)
        self._tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)

    def frames(self, number: int) -> list[bytes]:
        """All that came since the last time, which are so many."""
        found: list[bytes] = []
        end = time.monotonic() + 60
        while len(found) < number and time.monotonic() < end:
            found += self._now()
            time.sleep(0.001)
        return found + self._now()

    def _now(self) -> list[bytes]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, address = self._tap.recvfrom(65536)
                if address[2] == self._kind:
                    found.append(frame)
        return found

    def through(self, number: int, hook: str = INGRESS) -> list[Outcome]:
        """The same once more through the program."""
        return [self._node.send(frame, hook) for frame in self.frames(number)]

    def close(self) -> None:
        self._tap.close()
