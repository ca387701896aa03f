"""Real connections of this process to a VIP, and which endpoint of the node's took them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

Address = tuple[str, int]


class Everyone:
    """A TCP server on every local address: which endpoint was dialled shows in getsockname()."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self.port: int = server.getsockname()[1]

    def reached(self, vip: str, port: int = 80) -> str:
        """The address of the endpoint that a connection gets, or the errno that it ends with."""
        with socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET) as client:
            client.settimeout(5)
            try:
                client.connect((vip, port))
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, str(error))
            accepted, _ = self._server.accept()
            with accepted:
                return str(accepted.getsockname()[0]).removeprefix("::ffff:")

    def all_reached(self, vip: str, dials: int = 40) -> set[str]:
        """The endpoints that so many connections get."""
        return {self.reached(vip) for _ in range(dials)}


@contextmanager
def everyone() -> Iterator[Everyone]:
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", 0))
        server.listen(1024)
        server.settimeout(5)
        yield Everyone(server)


def without_traces(names: list[str]) -> list[str]:
    """Of these pins below /sys/fs/bpf, those that are still there."""
    return [name for name in names if os.path.lexists(f"/sys/fs/bpf/{name}")]
