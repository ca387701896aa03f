"""A small HTTP server: any number of ports on one thread.

It answers probes and scrapes, each from what is in memory; what takes longer another thread makes
(`Later`). No socket ever blocks: who sends or reads slowly waits alone, and when there are too many
the oldest is let go.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from pointsman.telemetry.connection import Connection, Handler
from pointsman.telemetry.httpwire import Address

log = logging.getLogger("pointsman.http")

_CONNECTIONS = 128
#: All addresses of this machine, by family: what listens there is meant for other hosts.
ANY_IPV4, ANY_IPV6 = "0.0.0.0", "::"  # noqa: S104


class _Wanted(NamedTuple):
    addresses: tuple[Address, ...]
    handler: Handler


class _Open(NamedTuple):
    addresses: tuple[Address, ...]
    sockets: tuple[socket.socket, ...]
    names: tuple[tuple[str, int], ...]


class HttpLoop:
    """Keeps listeners open for whoever wants them. All methods may be called from any thread.

    `changed` is called on the loop's thread after something was opened, or failed to be. A bind
    that failed is tried again after `retry` seconds; `patience`, in seconds, is for a request and
    its answer.
    """

    def __init__(
        self,
        changed: Callable[[], None] = lambda: None,
        *,
        retry: float = 3.0,
        patience: float = 10.0,
    ) -> None:
        self._tell = changed
        self.failed = ""
        self._retry, self._patience = retry, patience
        self._selector = selectors.DefaultSelector()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._read, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._wanted: dict[Hashable, _Wanted] = {}
        self._changed: set[Hashable] = set()
        self._open: dict[Hashable, _Open] = {}
        self._faults: dict[Hashable, str] = {}
        self._retry_at = 0.0
        self._connections: dict[Connection, None] = {}
        self._stopping = self._closed = False
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Closes everything and ends the thread."""
        self._stopping = True
        self._wake()
        if self._thread.ident is None:
            self._close_all()
        else:
            self._thread.join()

    def want(self, owner: Hashable, addresses: Sequence[Address], handler: Handler) -> None:
        """All of these are open soon, or none: a bind that fails is tried again. What else the
        owner had is closed first. No addresses: the owner wants nothing more."""
        with self._lock:
            if addresses:
                self._wanted[owner] = _Wanted(tuple(addresses), handler)
            else:
                self._wanted.pop(owner, None)
            self._changed.add(owner)
        self._wake()

    def faults(self) -> dict[Hashable, str]:
        """Why nothing is open for an owner."""
        return self._faults

    def bound(self, owner: Hashable) -> list[tuple[str, int]]:
        """Host and port of what is open for an owner now, also where it asked for port 0."""
        found = self._open.get(owner)
        return list(found.names) if found else []

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # full: it is awake
            if not self._closed:
                os.write(self._write, b"\0")

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._follow()
                self._finish()
                for key, _ in self._selector.select(self._pause()):
                    if isinstance(key.data, Connection):
                        self._step(key.data)
                    elif isinstance(key.fileobj, socket.socket):
                        owner, at = key.data
                        self._accept(key.fileobj, owner, at)
                    else:
                        os.read(self._read, 4096)
                self._expire()
        except Exception:
            log.exception("thread http failed")
            self.failed = "thread http failed"
            self._tell()
        finally:
            self._close_all()

    def _pause(self) -> float | None:
        ends = [each.deadline for each in self._connections][:1]
        if self._faults:
            ends.append(self._retry_at)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _follow(self) -> None:
        """Closes what is not wanted any more, then opens what is missing: a port may go from one
        owner to another."""
        with self._lock:
            changed, self._changed = self._changed, set()
            wanted = {owner: self._wanted.get(owner) for owner in changed | self._faults.keys()}
        if not changed and (not self._faults or time.monotonic() < self._retry_at):
            return
        for owner in changed & self._open.keys():
            want = wanted[owner]
            if want is None or want.addresses != self._open[owner].addresses:
                self._close(owner)
        faults: dict[Hashable, str] = {}
        opened = False
        for owner, want in wanted.items():
            if want is not None and owner not in self._open:
                try:
                    self._open[owner] = self._listen(owner, want)
                    opened = True
                except OSError as error:
                    faults[owner] = error.strerror or str(error)
                except OverflowError as error:  # no port
                    faults[owner] = str(error)
        failed, self._faults = faults != self._faults, faults
        self._retry_at = time.monotonic() + self._retry
        if opened or failed:
            self._tell()

    def _listen(self, owner: Hashable, want: _Wanted) -> _Open:
        sockets: list[socket.socket] = []
        try:
            for at in want.addresses:
                sockets.append(_listener(at))
                self._selector.register(sockets[-1], selectors.EVENT_READ, (owner, at))
        except (OSError, OverflowError):
            for each in sockets:
                self._close_socket(each)
            raise
        names = tuple(each.getsockname()[:2] for each in sockets)
        return _Open(want.addresses, tuple(sockets), names)

    def _accept(self, listener: socket.socket, owner: Hashable, at: Address) -> None:
        with self._lock:
            want = self._wanted.get(owner)
        try:
            taken, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_oldest()
            return
        if want is None:
            taken.close()
            return
        if len(self._connections) >= _CONNECTIONS:
            self._drop_oldest()
        connection = Connection(taken, at, want.handler, time.monotonic() + self._patience)
        self._connections[connection] = None
        self._selector.register(taken, selectors.EVENT_READ, connection)

    def _step(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # dropped by what came before it in the same round
        self._go_on(connection, connection.step())
        if connection.later:
            connection.later.then(self._wake)

    def _finish(self) -> None:
        """Sends what other threads have made."""
        for connection in [each for each in self._connections if each.later]:
            if connection.later and (response := connection.later.response):
                self._go_on(connection, connection.finish(response))

    def _go_on(self, connection: Connection, event: int) -> None:
        if event:
            self._selector.modify(connection.socket, event, connection)
        else:
            self._drop(connection)

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            if connection.deadline > now:
                break  # they are in the order of their deadlines
            self._drop(connection)

    def _drop_oldest(self) -> None:
        if oldest := next(iter(self._connections), None):
            self._drop(oldest)
        else:
            time.sleep(0.1)  # no descriptor is free, and none of them is ours

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection]
        if connection.later:
            connection.later.dropped = True
        self._close_socket(connection.socket)

    def _close(self, owner: Hashable) -> None:
        for each in self._open.pop(owner).sockets:
            self._close_socket(each)

    def _close_socket(self, each: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(each)
        each.close()

    def _close_all(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        for owner in list(self._open):
            self._close(owner)
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._selector.close()
            os.close(self._read)
            os.close(self._write)


def _listener(at: Address) -> socket.socket:
    try:
        found = socket.socket(socket.AF_INET6 if ":" in at.host else socket.AF_INET)
    except OSError:
        if not at.dual:
            raise
        found, at = socket.socket(), Address(ANY_IPV4, at.port)  # a kernel without IPv6
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if found.family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not at.dual)
        found.setblocking(False)
        found.bind((at.host, at.port))
        found.listen(64)
    except (OSError, OverflowError):
        found.close()
        raise
    return found


def wildcard(host: str, port: int) -> Address:
    """As Go's net.Listen: an unspecified address takes both families, whichever it is of."""
    if host in ("", ANY_IPV4, ANY_IPV6):
        return Address(ANY_IPV6, port, dual=True)
    return Address(host, port)
