"""Real connections of this process to a VIP, and which endpoint of the node's took them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager


class Everyone:
    """A TCP server on every local address: which endpoint was dialled shows in getsockname()."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self.port: int = server.getsockname()[1]

    def reached(self, vip: str, port: int = 80, *, patience: float = 30) -> str:
        """The address of the endpoint that a connection gets, the errno that it ends with, or
        "elsewhere" if another server took it, so that none comes in `patience` seconds."""
        self._server.settimeout(patience)
        with socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET) as client:
            client.settimeout(30)
            try:
                client.connect((vip, port))
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, str(error))
            try:
                accepted, _ = self._server.accept()
            except TimeoutError:
                return "elsewhere"
            with accepted:
                return str(accepted.getsockname()[0]).removeprefix("::ffff:")


@contextmanager
def everyone() -> Iterator[Everyone]:
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", 0))
        server.listen(1024)
        yield Everyone(server)
