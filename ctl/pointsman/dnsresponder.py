"""What the DNS server replies to a query: the zone's answer, an upstream's, or a refusal.

RFC 1035; 2308 and 6604 (negative answers and aliases), 6891 (EDNS0). It knows no sockets of
clients: octets in, octets out, or work for the loop that will give them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from dns.exception import DNSException
from dns.name import Name
from dns.rcode import BADVERS, FORMERR, NOTIMP, REFUSED, SERVFAIL, Rcode, to_text
from dns.rdataclass import IN
from dns.rdatatype import AAAA, AXFR, IXFR, A

from pointsman.dnsupstream import Address, ask_tcp, ask_udp
from pointsman.dnswire import (
    HEADER,
    RD,
    TC,
    Answer,
    Query,
    parse,
    question,
    read_answer,
    render,
    render_error,
)
from pointsman.zone import Zone

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Written by the server's thread only; whole numbers, so any thread may read them."""

    queries: Counter[str] = field(default_factory=Counter)  # answered, by rcode
    forwarded: int = 0
    upstream_errors: int = 0  # an upstream did not answer, or could not
    dropped: int = 0  # not answered: no query, no room, no way back
    errors: int = 0  # our own, each in the log with its traceback


class Responder:
    """Replies out of `zone`, and out of `upstreams` in order for clients that `is_local` takes.

    `upstreams` is asked for each query. `timeout` (of each) is in seconds, `payload` is the largest
    UDP reply in octets.
    """

    def __init__(
        self,
        zone: Zone,
        upstreams: Callable[[], Sequence[Address]],
        is_local: Callable[[str], bool],
        counters: Counters,
        *,
        timeout: float,
        payload: int,
    ) -> None:
        self._zone = zone
        self._upstreams = upstreams
        self._is_local = is_local
        self._counters = counters
        self._timeout = timeout
        self._payload = payload
        self._turn = itertools.count()

    def handle(
        self, wire: bytes, source: str, *, tcp: bool
    ) -> bytes | Coroutine[Any, Any, bytes] | None:
        """A reply, or the work that will give one, or None: stay silent."""
        try:
            return self._decide(wire, source, tcp)
        except Exception:
            return self._fault(wire)

    async def settle(self, wire: bytes, work: Coroutine[Any, Any, bytes]) -> bytes:
        """The reply that `handle` gave the work for."""
        try:
            return await work
        except Exception:
            return self._fault(wire)

    def _fault(self, wire: bytes) -> bytes:
        log.exception("dns query failed: %s", wire[:300].hex())
        self._counters.errors += 1
        return self.error(wire, SERVFAIL)

    def _decide(
        self, wire: bytes, source: str, tcp: bool
    ) -> bytes | Coroutine[Any, Any, bytes] | None:
        if len(wire) < HEADER.size or wire[2] & 0x80:  # replying to a reply could go on forever
            self._counters.dropped += 1
            return None
        if wire[2] & 0x78:
            return self.error(wire, NOTIMP)
        try:
            query = parse(wire)
        except DNSException:
            return self.error(wire, FORMERR)
        recursion = bool(self._upstreams()) and self._is_local(source)
        if query.version:
            return self._reply(query, Answer(BADVERS), recursion, tcp)
        if query.rdclass != IN or query.type in (AXFR, IXFR):
            return self._reply(query, Answer(REFUSED), recursion, tcp)
        answer = self._zone.lookup(query.name, query.type)
        if answer is None:
            if not recursion:
                return self._reply(query, Answer(REFUSED), recursion, tcp)
            self._counters.forwarded += 1
            return self._forward(query, tcp)
        if answer.outside and recursion and query.flags & RD and query.type in (A, AAAA):
            return self._chase(query, answer, answer.outside, tcp)
        return self._reply(query, answer, recursion, tcp)

    def _reply(self, query: Query, answer: Answer, recursion: bool, tcp: bool) -> bytes:
        self._count(answer.rcode)
        limit = 65535 if tcp else max(512, min(query.payload, self._payload))
        return render(query, answer, recursion, limit, self._payload, next(self._turn))

    def error(self, wire: bytes, rcode: Rcode) -> bytes:
        """A reply without a question, to a message that was not understood or has no room."""
        self._count(rcode)
        return render_error(wire, rcode)

    def _count(self, rcode: Rcode) -> None:
        self._counters.queries[to_text(rcode)] += 1

    async def _forward(self, query: Query, tcp: bool) -> bytes:
        reply = await self._ask(query, tcp)
        if reply is None:
            return self._reply(query, Answer(SERVFAIL), True, tcp)
        self._count(Rcode.make(reply[3] & 15))
        return query.wire[:2] + reply[2:]

    async def _chase(self, query: Query, answer: Answer, target: Name, tcp: bool) -> bytes:
        """Add what upstream knows of an ExternalName; the code is upstream's (RFC 6604)."""
        asked = question(target, query.type, self._payload)
        reply = await self._ask(asked, tcp=False)
        if reply and reply[2] << 8 & TC:
            reply = await self._ask(asked, tcp=True)
        complete = answer._replace(rcode=SERVFAIL)
        if reply:
            try:
                rcode, found = read_answer(reply, query.type)
                complete = answer._replace(rcode=rcode, answer=(*answer.answer, *found))
            except (DNSException, struct.error):
                self._counters.upstream_errors += 1
        return self._reply(query, complete, True, tcp)

    async def _ask(self, query: Query, tcp: bool) -> bytes | None:
        """The first upstream's reply that is none of failure, else the last failure's, or None."""
        failure = None
        for upstream in self._upstreams():
            try:
                async with asyncio.timeout(self._timeout):
                    reply = await (ask_tcp if tcp else ask_udp)(upstream, query)
            except (OSError, EOFError):
                reply = None
            if reply and reply[3] & 15 not in (SERVFAIL, NOTIMP, REFUSED):
                return reply
            self._counters.upstream_errors += 1
            failure = reply or failure
        return failure
