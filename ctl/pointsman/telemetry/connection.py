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


class Later:
    """An answer that another thread makes. `dropped`: nobody waits for it any more."""

    __slots__ = ("_wake", "dropped", "response")

    def __init__(self) -> None:
        self.response: Response | None = None
        self.dropped = False
        self._wake: Callable[[], None] | None = None

    def give(self, response: Response) -> None:
        """Here it is."""
        self.response = response
        if self._wake:
            self._wake()

    def then(self, wake: Callable[[], None]) -> None:
        """`wake` is called when it is there; look once after this whether it already was."""
        self._wake = wake


#: Answers a request that came in at this address. Called on the loop's thread.
Handler = Callable[[Request, Address], Response | Later]


class Connection:
    """One request and its answer, step by step: read, write, wait for the other side's end.

    Whoever ends the connection while his answer is made (`later`) gets none.
    """

    __slots__ = (
        "_at", "_handler", "_head", "_in", "_out", "answered", "deadline", "later", "socket"
    )  # fmt: skip

    def __init__(
        self, taken: socket.socket, at: Address, handler: Handler, deadline: float
    ) -> None:
        taken.setblocking(False)
        self.socket = taken
        self.deadline = deadline
        self._at, self._handler = at, handler
        # A view: of a large answer what is left is not copied after each step.
        self._in, self._out = bytearray(), memoryview(b"")
        self._head = self.answered = False
        #: What is waited for before anything can be written.
        self.later: Later | None = None

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
            self._out = memoryview(self._answer())
            self.answered = bool(self._out or self.later)
            return self._write() if self._out else selectors.EVENT_READ
        except BlockingIOError:
            return selectors.EVENT_WRITE if self._out else selectors.EVENT_READ
        except OSError:
            return 0

    def finish(self, response: Response) -> int:
        """What was waited for is there. As `step`."""
        self.later, self._out = None, memoryview(render(response, head=self._head))
        return self.step()

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
            self._head = request.method == "HEAD"
            response = self._handler(request, self._at)
            if isinstance(response, Later):
                self.later = response
                return b""
            return render(response, head=self._head)
        except BadRequest as error:
            return refuse(error.status)
        except Exception:
            log.exception("%s: the answer failed", self._at)
            return refuse(500)
