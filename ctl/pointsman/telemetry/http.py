"""A small HTTP server: any number of ports on one thread.

It answers probes and scrapes, each from what is in memory. No socket ever blocks: who sends or
reads slowly waits alone, and when there are too many the oldest is let go.
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

from pointsman.telemetry.httpwire import BadRequest, Request, Response, read, refuse, render

log = logging.getLogger("pointsman.http")

_CONNECTIONS = 128
_PATIENCE = 10.0  # seconds for a request and its answer
_RETRY = 3.0  # seconds until a bind that failed is tried again
#: All addresses of this machine, by family: what listens there is meant for other hosts.
ANY_IPV4, ANY_IPV6 = "0.0.0.0", "::"  # noqa: S104


class Address(NamedTuple):
    """Where to listen. `host` is an IP address; with `dual`, "::" takes IPv4 as well."""

    host: str
    port: int
    dual: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


#: Answers a request that came in at this address. Called on the loop's thread.
Handler = Callable[[Request, Address], Response]


class _Wanted(NamedTuple):
    addresses: tuple[Address, ...]
    handler: Handler


class _Open(NamedTuple):
    addresses: tuple[Address, ...]
    sockets: tuple[socket.socket, ...]


class _Connection:
    """One request and its answer, step by step: read, write, wait for the other side's end."""

    __slots__ = ("_at", "_handler", "_in", "_out", "answered", "deadline", "socket")

    def __init__(self, taken: socket.socket, at: Address, handler: Handler) -> None:
        taken.setblocking(False)
        self.socket = taken
        self.deadline = time.monotonic() + _PATIENCE
        self._at, self._handler = at, handler
        self._in, self._out = bytearray(), b""
        self.answered = False

    def step(self) -> int:
        """Does what can be done now; the selector's event to wait for next, 0 if it is over."""
        try:
            if self._out:
                return self._write()
            if not (data := self.socket.recv(4096)):
                return 0
            if self.answered:
                return selectors.EVENT_READ  # a body, or another request: not looked at
            self._in += data
            if not (out := self._answer()):
                return selectors.EVENT_READ
            self.answered, self._out = True, out
            return self._write()
        except BlockingIOError:
            return selectors.EVENT_WRITE if self._out else selectors.EVENT_READ
        except OSError:
            return 0

    def _write(self) -> int:
        self._out = self._out[self.socket.send(self._out) :]
        if self._out:
            return selectors.EVENT_WRITE
        # To close with something unread would be a reset, which can overtake the answer.
        self.socket.shutdown(socket.SHUT_WR)
        return selectors.EVENT_READ

    def _answer(self) -> bytes:
        try:
            request = read(bytes(self._in))
            if request is None:
                return b""
            return render(self._handler(request, self._at), head=request.method == "HEAD")
        except BadRequest as error:
            return refuse(error.status)
        except Exception:
            log.exception("%s: the answer failed", self._at)
            return refuse(500)


class HttpLoop:
    """Keeps listeners open for whoever wants them. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._read, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._wanted: dict[Hashable, _Wanted] = {}
        self._changed: set[Hashable] = set()
        self._open: dict[Hashable, _Open] = {}
        self._faults: dict[Hashable, str] = {}
        self._retry_at = 0.0
        self._connections: dict[_Connection, None] = {}
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
        return [each.getsockname()[:2] for each in found.sockets] if found else []

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # full: it is awake
            if not self._closed:
                os.write(self._write, b"\0")

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._follow()
                for key, _ in self._selector.select(self._pause()):
                    if isinstance(key.data, _Connection):
                        self._step(key.data)
                    elif isinstance(key.fileobj, socket.socket):
                        owner, at = key.data
                        self._accept(key.fileobj, owner, at)
                    else:
                        os.read(self._read, 4096)
                self._expire()
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
        faults = {}
        for owner, want in wanted.items():
            if want is not None and owner not in self._open:
                try:
                    self._open[owner] = self._listen(owner, want)
                except OSError as error:
                    faults[owner] = error.strerror or str(error)
                except OverflowError as error:  # no port
                    faults[owner] = str(error)
        self._faults = faults
        self._retry_at = time.monotonic() + _RETRY

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
        return _Open(want.addresses, tuple(sockets))

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
        connection = _Connection(taken, at, want.handler)
        self._connections[connection] = None
        self._selector.register(taken, selectors.EVENT_READ, connection)

    def _step(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return  # dropped by what came before it in the same round
        if event := connection.step():
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

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
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
