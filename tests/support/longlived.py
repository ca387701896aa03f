"""Connections that stay open for long: who takes them, and who comes back when one is ended."""

from __future__ import annotations

import errno
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Callable

PORT = 7000


class Servers:
    """Take what comes at any address, in the namespace of the thread that makes them, and keep it.
    With `greet` they say at which address; else nothing."""

    def __init__(self, *, greet: bool = False) -> None:
        self._greet = greet
        self._selector = selectors.DefaultSelector()
        server = socket.create_server(
            ("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
        )
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ, server)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(server,))
        self._thread.start()

    def _serve(self, server: socket.socket) -> None:
        while not self._stopped.is_set():
            for key, _ in self._selector.select(0.02):
                one = server if key.data else key.fileobj
                try:
                    if key.data:
                        accepted, _ = server.accept()
                        self._selector.register(accepted, selectors.EVENT_READ)
                        if self._greet:
                            name = accepted.getsockname()[0]
                            accepted.send(name.removeprefix("::ffff:").encode())
                        continue
                    if one.recv(64):  # type: ignore[union-attr]
                        continue
                except OSError:
                    pass
                self._selector.unregister(one)
                one.close()  # type: ignore[union-attr]

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


class Clients:
    """Hold connections to port 80, and connect again when one ends, as gRPC does; nothing is sent.

    `endpoint_of`: the address of the endpoint that such a socket has. `run` makes them in another
    namespace.
    """

    def __init__(
        self, family: int, dialled: str, endpoint_of: Callable[[socket.socket], str]
    ) -> None:
        self._family, self._dialled, self._endpoint_of = family, dialled, endpoint_of
        self._held: dict[socket.socket, str] = {}
        self.errors: Counter[str] = Counter()
        self.run: Callable[..., object] = lambda work, *arguments: work(*arguments)

    def open(self, count: int) -> None:
        for _ in range(count):
            client = socket.socket(self._family)
            self._held[client] = ""
            client.connect((self._dialled, 80))
            self._held[client] = self._endpoint_of(client)
            client.setblocking(False)

    def come_back(self) -> None:
        """Those that were ended."""
        for client in list(self._held):
            try:
                if client.recv(1):
                    continue
                self.errors["end of file"] += 1
            except BlockingIOError:
                continue
            except OSError as error:
                self.errors[errno.errorcode[error.errno or 0]] += 1
            del self._held[client]
            client.close()
            self.run(self.open, 1)

    @property
    def counts(self) -> Counter[str]:
        """Connections of each endpoint."""
        return Counter(self._held.values())

    def close(self) -> None:
        for client in self._held:
            client.close()
