"""A TLS proxy between an agent and the real API server that does, on demand, what networks do.

It speaks HTTP with both sides and passes bodies on as they come, so a fault can be put at a byte, a
line or a status. Tokens pass through; what a client's certificate says does not.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from typing import NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from tests.cluster.network import PLANE, inside
from tests.cluster.pki import Identity
from tests.cluster.plane import ControlPlane

_PORT = 6443
_CHUNK = 1 << 16


class Request(NamedTuple):
    """`verb` is list, watch or other; `resource` a plural; `at` monotonic seconds."""

    verb: str
    resource: str
    token: str
    at: float


class Cut(Exception):
    """Ends the connection by a reset, without another word."""


class Exchange:
    """One request and what becomes of it. `over` is set when the fault's time is."""

    def __init__(
        self,
        request: Request,
        client: ssl.SSLSocket,
        ask: Callable[[], http.client.HTTPResponse],
        over: threading.Event,
    ) -> None:
        self.request, self._client, self.over = request, client, over
        self._ask = ask

    def pieces(self) -> Iterator[bytes]:
        """The real answer's body as it comes, after its head was passed on."""
        answer = self._ask()
        self.head(answer.status, "Transfer-Encoding: chunked")
        while piece := answer.read1(_CHUNK):
            yield piece

    def lines(self) -> Iterator[bytes]:
        rest = b""
        for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line + b"\n" for line in lines)

    def head(self, status: int, *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Said", "Content-Type: application/json", *headers]
        self.raw("".join(f"{line}\r\n" for line in (*lines, "")).encode())

    def chunk(self, data: bytes) -> None:
        """An empty one is the end."""
        self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    def raw(self, data: bytes) -> None:
        self._client.sendall(data)


Fault = Callable[[Exchange], None]


class Rule:
    """A fault in force. `hits` counts it by resource."""

    def __init__(self, fault: Fault, verb: str, resources: Collection[str], times: int) -> None:
        self.fault, self.verb, self.resources, self.times = fault, verb, resources, times
        self.hits: Counter[str] = Counter()
        self.at: dict[str, list[float]] = {}
        self.over = threading.Event()

    def takes(self, request: Request) -> bool:
        if request.verb != self.verb and (self.verb or request.verb == "other"):
            return False
        if self.resources and request.resource not in self.resources:
            return False
        if self.times and self.hits[request.resource] >= self.times:
            return False
        self.hits[request.resource] += 1
        self.at.setdefault(request.resource, []).append(request.at)
        return True


class FaultProxy:
    """A context manager. Listens at the plane's address, as `url`. The port is none of those that
    the kernel gives to clients: else one of them may have it when this listens again."""

    def __init__(self, plane: ControlPlane, address: str = PLANE.v4, port: int = 7443) -> None:
        self._network, self._address, self._port = plane.network, address, port
        self._upstream = ssl.create_default_context(cafile=str(plane.pki.authority))
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._open: dict[socket.socket, str] = {}  # with the resource that was asked for
        self._closed = False
        self.requests: list[Request] = []
        self.statuses: Counter[int] = Counter()
        self.present(plane.pki.server(f"{address}.faultproxy", address))

    def __enter__(self) -> Self:
        self.listen()
        self.url = f"https://{self._address}:{self._port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.refuse()

    def present(self, identity: Identity) -> None:
        """The certificate for connections from now on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(identity.certificate, identity.key)
        self._context = context

    # -- connections ---------------------------------------------------------------------------

    def listen(self) -> None:
        with inside(self._network):
            self._listener = socket.create_server((self._address, self._port), backlog=128)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """Until `listen`: what is open is cut, what comes is refused."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self, *resources: str) -> None:
        """Ends all connections, or those of these resources, wherever they are."""
        with self._lock:
            for each, resource in self._open.items():
                if resource in resources or not resources:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(each, socket.SHUT_RDWR)

    # -- faults --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fault(
        self, fault: Fault, verb: str = "", resources: Collection[str] = (), times: int = 0
    ) -> Iterator[Rule]:
        """Puts it in force for lists and watches, or those of one verb or of these resources;
        `times` is for each resource, 0 without end. The first rule that takes a request has it."""
        rule = Rule(fault, verb, resources, times)
        with self._lock:
            self._rules.append(rule)
        try:
            yield rule
        finally:
            with self._lock:
                self._rules.remove(rule)
            rule.over.set()

    def count(self, verb: str = "") -> Counter[str]:
        """Requests so far, by resource."""
        with self._lock:
            return Counter(r.resource for r in self.requests if verb in ("", r.verb))

    def _rule(self, request: Request, client: socket.socket) -> Rule | None:
        with self._lock:
            self.requests.append(request)
            self._open[client] = request.resource
            return next((rule for rule in self._rules if rule.takes(request)), None)

    # -- one connection ------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                taken, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(taken,), daemon=True).start()

    def _serve(self, taken: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError, ValueError, http.client.HTTPException))
            stack.enter_context(taken)
            taken.settimeout(60)
            client = stack.enter_context(self._context.wrap_socket(taken, server_side=True))
            client.settimeout(None)
            stack.enter_context(self._registered(client))
            reader = stack.enter_context(client.makefile("rb"))
            try:
                while self._one(reader, client):
                    pass
            except Cut:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    @contextlib.contextmanager
    def _registered(self, each: socket.socket, resource: str = "") -> Iterator[None]:
        with self._lock:
            self._open[each] = resource
        try:
            yield
        finally:
            with self._lock:
                del self._open[each]

    def _one(self, reader: BufferedReader, client: ssl.SSLSocket) -> bool:
        line = reader.readline()
        if not line.strip():
            return False
        method, target, _ = line.decode().split()
        headers = http.client.parse_headers(reader)
        body = reader.read(int(headers.get("Content-Length", 0)))
        request = _request(method, target, headers.get("Authorization", ""))
        with contextlib.ExitStack() as stack:

            def ask() -> http.client.HTTPResponse:
                with inside(self._network):
                    raw = socket.create_connection((PLANE.v4, _PORT), 10)
                raw.settimeout(None)
                tls = stack.enter_context(self._upstream.wrap_socket(raw, server_hostname=PLANE.v4))
                stack.enter_context(self._registered(tls, request.resource))
                connection = http.client.HTTPConnection(PLANE.v4)
                connection.sock = tls
                kept = ("authorization", "content-type", "accept", "user-agent")
                passed = {k: v for k, v in headers.items() if k.lower() in kept}
                connection.request(method, target, body or None, passed)
                answer = stack.enter_context(connection.getresponse())
                self.statuses[answer.status] += 1
                return answer

            rule = self._rule(request, client)
            over = rule.over if rule else threading.Event()
            (rule.fault if rule else through)(Exchange(request, client, ask, over))
        return True


def _request(method: str, target: str, authorization: str) -> Request:
    parts = urlsplit(target)
    watch = "watch" in parse_qs(parts.query)
    verb = "other" if method != "GET" else "watch" if watch else "list"
    token = authorization.removeprefix("Bearer ")
    return Request(verb, parts.path.rpartition("/")[2], token, time.monotonic())


# -- what can happen -----------------------------------------------------------------------------


def through(exchange: Exchange) -> None:
    for piece in exchange.pieces():
        exchange.chunk(piece)
    exchange.chunk(b"")


def cut(exchange: Exchange) -> None:
    """Half of the first piece, then a reset: amid a page, or amid a line of a watch."""
    for piece in exchange.pieces():
        exchange.chunk(piece[: len(piece) // 2])
        raise Cut
    raise Cut


def half(exchange: Exchange) -> None:
    """Half of what the head promised, then a proper end of the connection."""
    exchange.head(200, "Content-Length: 200")
    exchange.raw(b'{"metadata":{"resourceVersion":"1"},"items":[')
    exchange.over.wait(0.1)
    raise Cut


def stall(exchange: Exchange) -> None:
    """Half of the first piece, then nothing, while the connection stays."""
    for piece in exchange.pieces():
        exchange.chunk(piece[: len(piece) // 2])
        break
    exchange.over.wait()
    raise Cut


def mute(exchange: Exchange) -> None:
    """Not even a head."""
    exchange.over.wait()
    raise Cut


def drip(exchange: Exchange) -> None:
    """Seven bytes at a time."""
    for piece in exchange.pieces():
        for start in range(0, len(piece), 7):
            exchange.chunk(piece[start : start + 7])
            exchange.over.wait(0.001)
    exchange.chunk(b"")


def one_event(exchange: Exchange) -> None:
    """A watch that ends after its first event, in good order."""
    for line in exchange.lines():
        exchange.chunk(line)
        break
    exchange.chunk(b"")


def ends_at_once(exchange: Exchange) -> None:
    exchange.head(200, "Content-Length: 0")


def answer(status: int, body: bytes = b"", *headers: str) -> Fault:
    """That, instead of the API server's."""

    def fault(exchange: Exchange) -> None:
        exchange.head(status, f"Content-Length: {len(body)}", *headers)
        exchange.raw(body)

    return fault


def raw(data: bytes) -> Fault:
    """Bytes in the place of HTTP."""

    def fault(exchange: Exchange) -> None:
        exchange.raw(data)
        exchange.over.wait(0.05)
        raise Cut

    return fault


def hold(release: threading.Event) -> Fault:
    """Passed on only once the event is set."""

    def fault(exchange: Exchange) -> None:
        release.wait()
        through(exchange)

    return fault


#: A watch's event that its version is too old.
expired = answer(
    200,
    b'{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},'
    b'"status":"Failure","reason":"Expired","code":410,"message":"too old"}}\n',
)
