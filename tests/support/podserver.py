"""What a pod of the topology runs: podserver.py NAME PORT, TCP and UDP of both families.

TCP: one line "NAME CLIENT-ADDRESS CLIENT-PORT" at once; then each line back, but for "get N": N
bytes of `stream`. UDP: for each datagram that line, filled up with dots to the datagram's length.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from array import array

_PIECE = 1 << 16


def stream(length: int) -> bytes:
    """Bytes that say where they are, so that a checksum shows one that is lost or doubled."""
    words = array("I", range(-(-length // 4)))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[:length]


def _greeting(name: str, peer: tuple[str, int]) -> bytes:
    return f"{name} {peer[0]} {peer[1]}\n".encode()


def _talk(name: str, connection: socket.socket, peer: tuple[str, int]) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(_greeting(name, peer))
        for line in connection.makefile("rb"):
            if line.startswith(b"get "):
                connection.sendall(stream(int(line[4:])))
            else:
                connection.sendall(line)


def _segments(name: str, family: int, port: int) -> None:
    with socket.create_server(("", port), family=family, backlog=512) as server:
        while True:
            connection, peer = server.accept()
            threading.Thread(target=_talk, args=(name, connection, peer[:2]), daemon=True).start()


def _datagrams(name: str, family: int, port: int) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(("", port))
        while True:
            data, peer = server.recvfrom(_PIECE)
            with contextlib.suppress(OSError):
                server.sendto(_greeting(name, peer[:2]).ljust(len(data), b"."), peer)


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    threads = [
        threading.Thread(target=serve, args=(name, family, port))
        for serve in (_segments, _datagrams)
        for family in (socket.AF_INET, socket.AF_INET6)
    ]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
