"""One connection of the HTTP server, which never waits."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable

from pointsman.telemetry.httpwire import (
    Address,
    BadRequest,
    Request,
    Response,
    read,
    refuse,
    render,
)

log = logging.getLogger("pointsman.http")

#: Answers a request that came in at this address. Called on the loop's thread.
Handler = Callable[[Request, Address], Response]


class Connection:
    """One request and its answer, step by step: read, write, wait for the other side's end."""

    __slots__ = ("_at", "_handler", "_in", "_out", "answered", "deadline", "socket")

    def __init__(
        self, taken: socket.socket, at: Address, handler: Handler, deadline: float
    ) -> None:
        taken.setblocking(False)
        self.socket = taken
        self.deadline = deadline
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
