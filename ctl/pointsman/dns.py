"""The DNS server: answers from a Zone, forwards the rest for local clients. UDP and TCP.

It runs an asyncio loop in a daemon thread of its own. RFC 1035 and 7766 (TCP), 6891 (EDNS0),
8482 (ANY), 9619 (one question). dnspython reads the names; replies are joined from the wire form
that the zone gives, because one dnspython message of thousands of records takes so long to build
that every other client would wait for it.

It listens on given addresses only, never on 0.0.0.0 or ::, so that a reply always leaves from the
address that was asked: clients drop any other, and a wildcard socket replies from whatever
address the route prefers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import logging
import secrets
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dns.exception import DNSException, FormError
from dns.name import Name, from_wire, root
from dns.rcode import BADVERS, FORMERR, NOERROR, NOTIMP, NXDOMAIN, REFUSED, SERVFAIL, Rcode, to_text
from dns.rdataclass import IN
from dns.rdatatype import AAAA, AXFR, CNAME, IXFR, OPT, A

from pointsman.zone import Answer, RRset, Zone, to_wire

log = logging.getLogger(__name__)

Address = tuple[str, int]
# Loopback, RFC 1918 and unique local addresses (RFC 4193): this host and its pods.
PRIVATE = ("127.0.0.0/8", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")

_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
_DO = 0x8000
_HEADER = struct.Struct("!6H")  # id, flags, then the counts of the four sections
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length of the data
_MENDS = {
    errno.EADDRINUSE: "another server has it (ss -lntup names it): stop that or listen elsewhere",
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "no device of this host has the address: add it or listen elsewhere",
}
_MAX_EXTRA = 8  # records beside the question; a client sends OPT and TSIG, an attacker thousands
_BATCH = 64  # datagrams read before the loop turns to other sockets
_PIPELINE = 4  # queries of one TCP connection in work at a time


class DnsListenError(OSError):
    """An address can't be listened on; the text names it and the mend, `errno` is the kernel's."""


class Query(NamedTuple):
    """A message with one question; `payload` is 0 without EDNS, at least 512 with it."""

    wire: bytes
    flags: int
    name: Name
    type: int
    rdclass: int
    end: int  # offset of the question's end
    payload: int = 0
    version: int = 0
    edns_flags: int = 0


@dataclass(slots=True)
class Counters:
    """Written by the server's thread only; whole numbers, so any thread may read them."""

    queries: Counter[str] = field(default_factory=Counter)  # answered, by rcode
    forwarded: int = 0
    upstream_errors: int = 0  # an upstream did not answer, or could not
    dropped: int = 0  # not answered: no query, no room, no way back
    errors: int = 0  # our own, each in the log with its traceback


class DnsServer:
    """Serves `zone` on each of `listen`, (IP address, port) with port 0 for any free one.

    What is outside the zone goes to `upstreams` in order, and is REFUSED without any. It is
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
        upstreams: Sequence[Address] | None = None,
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
        self._candidates = [(ipaddress.ip_address(host), port) for host, port in upstreams or ()]
        self._allow = [ipaddress.ip_network(network) for network in allow]
        self._own = {ipaddress.ip_address(address) for address in own}
        self._timeout = timeout
        self._idle = idle
        self._payload = payload
        self._max_connections = max_connections
        self._max_forwards = max_forwards
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = itertools.count()
        self._is_local = self._in_networks
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()

    def start(self) -> None:
        """Bind every address, then serve. Raises DnsListenError, with nothing left bound."""
        pairs: list[tuple[socket.socket, socket.socket]] = []
        try:
            for host, port in self._listen:
                pairs.append(_bind(host, port))
        except BaseException:
            for sock in itertools.chain.from_iterable(pairs):
                sock.close()
            raise
        self.addresses = [udp.getsockname()[:2] for udp, _ in pairs]
        self._is_local = lru_cache(4096)(self._in_networks)
        bound = {(ipaddress.ip_address(host), port) for host, port in self.addresses}
        self.upstreams = []
        for upstream in self._candidates:
            if upstream[0] in self._own or upstream in bound:
                log.warning("dns upstream %s port %d is this server: left out", *upstream)
            else:
                self.upstreams.append((str(upstream[0]), upstream[1]))
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
            reply = self._handle(wire, client[0], tcp=False)
            if reply is None or isinstance(reply, bytes):
                self._send(udp, reply, client)
            elif len(self._tasks) >= self._max_forwards:
                reply.close()
                self._send(udp, self._error(wire, SERVFAIL), client)
            else:
                task = asyncio.ensure_future(self._send_later(udp, wire, reply, client))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _send_later(
        self, udp: socket.socket, wire: bytes, reply: Coroutine[Any, Any, bytes], client: Any
    ) -> None:
        self._send(udp, await self._settle(wire, reply), client)

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
            reply = self._handle(wire, source, tcp=True)
            if isinstance(reply, Coroutine):
                reply = await self._settle(wire, reply)
            if reply:
                writer.write(len(reply).to_bytes(2, "big") + reply)
                async with asyncio.timeout(self._idle):
                    await writer.drain()
        except OSError:  # gone, or not reading
            self.counters.dropped += 1
            writer.transport.abort()
        finally:
            turns.release()

    def _handle(
        self, wire: bytes, source: str, *, tcp: bool
    ) -> bytes | Coroutine[Any, Any, bytes] | None:
        """A reply, or the work that will give one, or None: stay silent."""
        try:
            return self._decide(wire, source, tcp)
        except Exception:
            return self._fault(wire)

    async def _settle(self, wire: bytes, work: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            return await work
        except Exception:
            return self._fault(wire)

    def _fault(self, wire: bytes) -> bytes:
        log.exception("dns query failed: %s", wire[:300].hex())
        self.counters.errors += 1
        return self._error(wire, SERVFAIL)

    def _decide(
        self, wire: bytes, source: str, tcp: bool
    ) -> bytes | Coroutine[Any, Any, bytes] | None:
        if len(wire) < _HEADER.size or wire[2] & 0x80:  # replying to a reply could go on forever
            self.counters.dropped += 1
            return None
        if wire[2] & 0x78:
            return self._error(wire, NOTIMP)
        try:
            query = parse(wire)
        except DNSException:
            return self._error(wire, FORMERR)
        recursion = bool(self.upstreams) and self._is_local(source)
        if query.version:
            return self._reply(query, Answer(BADVERS), recursion, tcp)
        if query.rdclass != IN or query.type in (AXFR, IXFR):
            return self._reply(query, Answer(REFUSED), recursion, tcp)
        answer = self._zone.lookup(query.name, query.type)
        if answer is None:
            if not recursion:
                return self._reply(query, Answer(REFUSED), recursion, tcp)
            self.counters.forwarded += 1
            return self._forward(query, tcp)
        if answer.outside and recursion and query.flags & _RD and query.type in (A, AAAA):
            return self._chase(query, answer, answer.outside, tcp)
        return self._reply(query, answer, recursion, tcp)

    def _reply(self, query: Query, answer: Answer, recursion: bool, tcp: bool) -> bytes:
        self._count(answer.rcode)
        limit = 65535 if tcp else max(512, min(query.payload, self._payload))
        return render(query, answer, recursion, limit, self._payload, next(self._turn))

    def _error(self, wire: bytes, rcode: Rcode) -> bytes:
        """A reply without a question, to a message that was not understood."""
        self._count(rcode)
        flags = _QR | int.from_bytes(wire[2:4], "big") & (0x7800 | _RD) | rcode
        return wire[:2] + _HEADER.pack(0, flags, 0, 0, 0, 0)[2:]

    def _count(self, rcode: Rcode) -> None:
        self.counters.queries[to_text(rcode)] += 1

    async def _forward(self, query: Query, tcp: bool) -> bytes:
        reply = await self._ask(query, tcp)
        if reply is None:
            return self._reply(query, Answer(SERVFAIL), True, tcp)
        self._count(Rcode.make(reply[3] & 15))
        return query.wire[:2] + reply[2:]

    async def _chase(self, query: Query, answer: Answer, target: Name, tcp: bool) -> bytes:
        """Add what upstream knows of an ExternalName; the code is upstream's (RFC 6604)."""
        question = _HEADER.pack(0, _RD, 1, 0, 0, 1) + to_wire(target)
        opt = b"\0" + _RECORD.pack(OPT, self._payload, 0, 0)
        asked = parse(question + struct.pack("!HH", query.type, IN) + opt)
        reply = await self._ask(asked, tcp=False)
        if reply and reply[2] << 8 & _TC:
            reply = await self._ask(asked, tcp=True)
        complete = answer._replace(rcode=SERVFAIL)
        if reply:
            try:
                rcode, found = read_answer(reply, query.type)
                complete = answer._replace(rcode=rcode, answer=(*answer.answer, *found))
            except (DNSException, struct.error):
                self.counters.upstream_errors += 1
        return self._reply(query, complete, True, tcp)

    async def _ask(self, query: Query, tcp: bool) -> bytes | None:
        """The first upstream's reply that is none of failure, else the last failure's, or None."""
        failure = None
        for upstream in self.upstreams:
            try:
                async with asyncio.timeout(self._timeout):
                    reply = await (_ask_tcp if tcp else _ask_udp)(upstream, query)
            except (OSError, EOFError):
                reply = None
            if reply and reply[3] & 15 not in (SERVFAIL, NOTIMP, REFUSED):
                return reply
            self.counters.upstream_errors += 1
            failure = reply or failure
        return failure


def upstreams_from_resolv_conf(path: str = "/etc/resolv.conf") -> list[Address]:
    """The name servers of resolv.conf(5), port 53. No file: none. Raises OSError otherwise."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    servers = []
    for words in map(str.split, lines):
        if len(words) > 1 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                servers.append((str(ipaddress.ip_address(words[1])), 53))
    return servers


def parse(wire: bytes) -> Query:
    """Read a query of at least 12 octets. Raises dns.exception.DNSException on anything odd."""
    _, flags, questions, *others = _HEADER.unpack_from(wire)
    if questions != 1 or sum(others) > _MAX_EXTRA:
        raise FormError
    try:
        name, size = from_wire(wire, _HEADER.size)
        offset = _HEADER.size + size
        rdtype, rdclass = struct.unpack_from("!HH", wire, offset)
        offset += 4
        # The reply echoes the question's octets and points into them, so no pointers in there.
        query = Query(wire, flags, name, rdtype, rdclass, offset)
        if size != len(to_wire(name)):
            raise FormError
        for _ in range(sum(others)):
            owner, size = from_wire(wire, offset)
            rdtype, payload, ttl, length = _RECORD.unpack_from(wire, offset + size)
            offset += size + _RECORD.size + length
            if rdtype == OPT:
                if query.payload or owner != root:
                    raise FormError
                query = query._replace(
                    payload=max(512, payload), version=ttl >> 16 & 0xFF, edns_flags=ttl & 0xFFFF
                )
    except struct.error as error:
        raise FormError from error
    if offset != len(wire):
        raise FormError
    return query


def render(
    query: Query, answer: Answer, recursion: bool, limit: int, payload: int, turn: int
) -> bytes:
    """The reply in at most `limit` octets: as many records as fit, with TC if some did not.

    Record sets start at their `turn`-th record, so that each gets to be first, and gets through
    when not all do. `payload` is the UDP size we take (RFC 6891).
    """
    rcode = answer.rcode
    flags = _QR | query.flags & _RD | (_RA if recursion else 0) | rcode & 15
    if answer.answer or rcode in (NOERROR, NXDOMAIN):
        flags |= _AA
    opt = b""
    if query.payload:
        opt = b"\0" + _RECORD.pack(OPT, payload, rcode >> 4 << 24 | query.edns_flags & _DO, 0)
    out = bytearray(_HEADER.size) + query.wire[_HEADER.size : query.end]
    counts = [0, 0, 0]
    for number, section in enumerate((answer.answer, answer.authority, answer.additional)):
        for record in _records(section, query.name, turn):
            if len(out) + len(record) + len(opt) > limit:
                flags |= _TC if number < 2 else 0  # the additional section may be left out
                break
            out += record
            counts[number] += 1
    counts[2] += bool(opt)
    out[2 : _HEADER.size] = _HEADER.pack(0, flags, 1, *counts)[2:]
    out[:2] = query.wire[:2]
    return bytes(out + opt)


def read_answer(reply: bytes, qtype: int) -> tuple[Rcode, tuple[RRset, ...]]:
    """The code of a reply, and its CNAMEs and records of `qtype`, one to an RRset.

    For types whose data holds no names, as A and AAAA. Raises DNSException or struct.error.
    """
    _, flags, questions, answers, *_ = _HEADER.unpack_from(reply)
    offset = _HEADER.size
    for _ in range(questions):
        offset += from_wire(reply, offset)[1] + 4
    found = []
    for _ in range(answers):
        owner, size = from_wire(reply, offset)
        rdtype, rdclass, ttl, length = _RECORD.unpack_from(reply, offset + size)
        start = offset + size + _RECORD.size
        offset = start + length
        if rdtype == CNAME:
            found.append(RRset(owner, rdtype, ttl, [to_wire(from_wire(reply, start)[0])]))
        elif rdtype == qtype and rdclass == IN:
            found.append(RRset(owner, rdtype, ttl, [reply[start:offset]]))
    return Rcode.make(flags & 15), tuple(found)


def _records(section: Sequence[RRset], question: Name, turn: int) -> Iterator[bytes]:
    for owner, rdtype, ttl, rdata in section:
        # RFC 1035, 4.1.4: the labels shared with the question become a pointer into it.
        shared = 0
        for ours, theirs in zip(reversed(owner.labels), reversed(question.labels), strict=False):
            if ours != theirs:
                break
            shared += len(ours) + 1
        start = to_wire(owner)
        if shared > 2:
            pointer = 0xC000 | _HEADER.size + len(to_wire(question)) - shared
            start = start[: len(start) - shared] + pointer.to_bytes(2, "big")
        for i in range(len(rdata)):
            data = rdata[(i + turn) % len(rdata)]
            yield start + _RECORD.pack(rdtype, IN, ttl, len(data)) + data


def _bind(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A UDP and a TCP socket on the same address and port. Raises DnsListenError."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise DnsListenError(errno.EINVAL, f"dns: {host!r} is no IP address") from error
    if address.is_unspecified:
        text = f"dns: can't listen on {host}: replies might leave from another address; list them"
        raise DnsListenError(errno.EINVAL, text)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for attempt in itertools.count():
        socks: list[socket.socket] = []
        try:
            chosen = port
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
                socks.append(sock)
                if kind == socket.SOCK_STREAM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(socket.getaddrinfo(host, chosen, type=kind)[0][4])
                chosen = sock.getsockname()[1]
            return socks[0], socks[1]
        except OSError as error:
            for sock in socks:
                sock.close()
            if port == 0 and error.errno == errno.EADDRINUSE and attempt < 8:
                continue  # the port that UDP was given is taken in TCP
            mend = _MENDS.get(error.errno or 0, "choose another address")
            text = f"dns: can't listen on {host} port {port}: {error.strerror}; {mend}"
            raise DnsListenError(error.errno or errno.EINVAL, text) from error
    raise AssertionError("unreachable")


async def _frame(reader: asyncio.StreamReader, idle: float) -> bytes:
    """The next message of a TCP connection; b"" when it ended or stayed silent for `idle` s."""
    try:
        async with asyncio.timeout(idle):
            size = int.from_bytes(await reader.readexactly(2), "big")
            return await reader.readexactly(size)
    except (EOFError, OSError):
        return b""


async def _ask_tcp(upstream: Address, query: Query) -> bytes:
    message = secrets.token_bytes(2) + query.wire[2:]
    reader, writer = await asyncio.open_connection(*upstream)
    try:
        writer.write(len(message).to_bytes(2, "big") + message)
        size = int.from_bytes(await reader.readexactly(2), "big")
        reply = await reader.readexactly(size)
    finally:
        writer.close()
    if not _is_reply(reply, message, query):
        raise ConnectionError("not the reply to our question")
    return reply


async def _ask_udp(upstream: Address, query: Query) -> bytes:
    """A fresh port and ID for each question, against forged replies (RFC 5452)."""
    message = secrets.token_bytes(2) + query.wire[2:]
    loop = asyncio.get_running_loop()
    family, _, _, _, address = socket.getaddrinfo(*upstream, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(address)  # the kernel then takes datagrams from there only
        await loop.sock_sendall(sock, message)
        while True:
            reply = await loop.sock_recv(sock, 65535)
            if _is_reply(reply, message, query):
                return reply


def _is_reply(reply: bytes, message: bytes, query: Query) -> bool:
    if len(reply) < _HEADER.size or reply[:2] != message[:2] or not reply[2] & 0x80:
        return False
    questions = int.from_bytes(reply[4:6], "big")
    if not questions:
        return bool(reply[3] & 15)  # some leave it out when they fail
    try:
        name, size = from_wire(reply, _HEADER.size)
    except DNSException:
        return False
    end = _HEADER.size + size + 4
    return (
        questions == 1
        and name == query.name
        and reply[end - 4 : end] == message[query.end - 4 : query.end]
    )
