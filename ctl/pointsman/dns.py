"""The DNS server: answers from a Zone, forwards the rest for local clients. UDP and TCP.

It runs an asyncio loop in a daemon thread of its own. Here is what concerns sockets and turns
(RFC 1035, 4.2, and RFC 7766 for TCP); what is replied stands in `dnsresponder`.

It listens on given addresses only, never on 0.0.0.0 or ::, so that a reply always leaves from the
address that was asked: clients drop any other, and a wildcard socket replies from whatever
address the route prefers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from dns.rcode import SERVFAIL

from pointsman.dnslisten import bind
from pointsman.dnsresponder import Counters, Responder
from pointsman.dnsupstream import Address
from pointsman.zone import Zone

log = logging.getLogger(__name__)

# Loopback, RFC 1918 and unique local addresses (RFC 4193): this host and its pods.
PRIVATE = ("127.0.0.0/8", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")

_BATCH = 64  # datagrams read before the loop turns to other sockets
_PIPELINE = 4  # queries of one TCP connection in work at a time


class DnsServer:
    """Serves `zone` on each of `listen`, (IP address, port) with port 0 for any free one.

    What is outside the zone goes to `upstreams` in order, and is REFUSED without any; a function
    may give others each time, and the same list as long as they are the same. It is
    forwarded only for clients in the networks `allow`, on a listen address or one of `own`, and
    never to this server itself: an upstream that is a listen address, or whose host is in `own`
    (the server's ClusterIP), is left out. `timeout` (of each upstream) and `idle` (of a TCP
    connection) are in seconds, `payload` is the largest UDP reply in octets. Raises ValueError
    for an upstream, network or own address that is none.
    """

    def __init__(
        self,
        zone: Zone,
        listen: Sequence[Address],
        upstreams: Sequence[Address] | Callable[[], Sequence[Address]] | None = None,
        *,
        allow: Sequence[str] = PRIVATE,
        own: Sequence[str] = (),
        timeout: float = 2.0,
        idle: float = 10.0,
        payload: int = 1232,
        max_connections: int = 64,
        max_forwards: int = 256,
    ) -> None:
        self.counters = Counters()
        self.addresses: list[Address] = []
        self.upstreams: list[Address] = []
        self._zone = zone
        self._listen = tuple(listen)
        given = upstreams if callable(upstreams) else tuple(upstreams or ())
        self._given = given if callable(given) else lambda: given
        self._taken: Sequence[Address] = ()  # as given when `upstreams` was made
        for host, _ in self._given():
            ipaddress.ip_address(host)
        self._allow = [ipaddress.ip_network(network) for network in allow]
        self._own = {ipaddress.ip_address(address) for address in own}
        self._timeout = timeout
        self._idle = idle
        self._payload = payload
        self._max_connections = max_connections
        self._max_forwards = max_forwards
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._responder = self._make_responder()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()

    def start(self) -> None:
        """Bind every address, then serve. Raises DnsListenError, with nothing left bound."""
        pairs: list[tuple[socket.socket, socket.socket]] = []
        try:
            for host, port in self._listen:
                pairs.append(bind(host, port))
        except BaseException:
            for sock in itertools.chain.from_iterable(pairs):
                sock.close()
            raise
        self.addresses = [udp.getsockname()[:2] for udp, _ in pairs]
        self._usable()
        self._responder = self._make_responder()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(pairs, started), name="dns", daemon=True
        )
        self._thread.start()
        started.result()

    def stop(self) -> None:
        """Close every socket and end the thread. Nothing happens if it does not run."""
        if self._thread and self._loop:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(timeout=5)
            self._thread = self._loop = None

    def _make_responder(self) -> Responder:
        return Responder(
            self._zone,
            self._usable,
            lru_cache(4096)(self._in_networks),
            self.counters,
            timeout=self._timeout,
            payload=self._payload,
        )

    def _usable(self) -> Sequence[Address]:
        """The upstreams of now but for this server itself."""
        given = self._given()
        if given is not self._taken:
            bound = {(ipaddress.ip_address(host), port) for host, port in self.addresses}
            found = []
            for host, port in given:
                upstream = ipaddress.ip_address(host), port
                if upstream[0] in self._own or upstream in bound:
                    log.warning("dns upstream %s port %d is this server: left out", *upstream)
                else:
                    found.append((str(upstream[0]), port))
            self.upstreams, self._taken = found, given
        return self.upstreams

    def _in_networks(self, source: str) -> bool:
        address = ipaddress.ip_address(source)
        mine = self._own.union(ipaddress.ip_address(host) for host, _ in self.addresses)
        return address in mine or any(address in network for network in self._allow)

    def _run(
        self, pairs: Sequence[tuple[socket.socket, socket.socket]], started: Future[None]
    ) -> None:
        try:
            asyncio.run(self._serve(pairs, started))
        except BaseException as error:
            if started.done():
                log.exception("dns server ended")
            else:
                started.set_exception(error)

    async def _serve(
        self, pairs: Sequence[tuple[socket.socket, socket.socket]], started: Future[None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        servers: list[asyncio.Server] = []
        try:
            for udp, tcp in pairs:
                servers.append(await asyncio.start_server(self._connected, sock=tcp))
                self._loop.add_reader(udp, self._readable, udp)
            started.set_result(None)
            await self._stopped.wait()
        finally:
            for server in servers:
                server.close()
            for udp, _ in pairs:
                self._loop.remove_reader(udp)
                udp.close()

    def _readable(self, udp: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                wire, client = udp.recvfrom(4096)
            except BlockingIOError:
                return
            reply = self._responder.handle(wire, client[0], tcp=False)
            if reply is None or isinstance(reply, bytes):
                self._send(udp, reply, client)
            elif len(self._tasks) >= self._max_forwards:
                reply.close()
                self._send(udp, self._responder.error(wire, SERVFAIL), client)
            else:
                task = asyncio.ensure_future(self._send_later(udp, wire, reply, client))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _send_later(
        self, udp: socket.socket, wire: bytes, reply: Coroutine[Any, Any, bytes], client: Any
    ) -> None:
        self._send(udp, await self._responder.settle(wire, reply), client)

    def _send(self, udp: socket.socket, reply: bytes | None, client: Any) -> None:
        try:
            if reply:
                udp.sendto(reply, client)
        except OSError:  # no room, no route, or port 0: the client asks again if it is one
            self.counters.dropped += 1

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if peer is None or self._connections >= self._max_connections:
            self.counters.dropped += 1
            writer.transport.abort()
            return
        # drain() then waits until the kernel has all, so a client that never reads times out.
        writer.transport.set_write_buffer_limits(high=0)
        self._connections += 1
        turns = asyncio.Semaphore(_PIPELINE)
        try:
            async with asyncio.TaskGroup() as group:
                while wire := await _frame(reader, self._idle):
                    await turns.acquire()
                    group.create_task(self._converse(wire, peer[0], writer, turns))
        finally:
            self._connections -= 1
            writer.close()

    async def _converse(
        self, wire: bytes, source: str, writer: asyncio.StreamWriter, turns: asyncio.Semaphore
    ) -> None:
        try:
            reply = self._responder.handle(wire, source, tcp=True)
            if isinstance(reply, Coroutine):
                reply = await self._responder.settle(wire, reply)
            if reply:
                writer.write(len(reply).to_bytes(2, "big") + reply)
                async with asyncio.timeout(self._idle):
                    await writer.drain()
        except OSError:  # gone, or not reading
            self.counters.dropped += 1
            writer.transport.abort()
        finally:
            turns.release()


async def _frame(reader: asyncio.StreamReader, idle: float) -> bytes:
    """The next message of a TCP connection; b"" when it ended or stayed silent for `idle` s."""
    try:
        async with asyncio.timeout(idle):
            size = int.from_bytes(await reader.readexactly(2), "big")
            return await reader.readexactly(size)
    except (EOFError, OSError):
        return b""
