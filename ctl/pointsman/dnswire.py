"""DNS messages as octets: queries read, replies written. Pure.

RFC 1035, 6891 (EDNS0) and 9619 (one question). dnspython reads the names; replies are joined from
the wire form that the zone gives, because one dnspython message of thousands of records takes so
long to build that every other client would wait for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dns.exception import FormError
from dns.name import Name, from_wire, root
from dns.rcode import NOERROR, NXDOMAIN, Rcode
from dns.rdataclass import IN
from dns.rdatatype import CNAME, OPT

QR, AA, TC, RD, RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
DO = 0x8000
HEADER = struct.Struct("!6H")  # id, flags, then the counts of the four sections
RECORD = struct.Struct("!HHIH")  # type, class, TTL, length of the data
_MAX_EXTRA = 8  # records beside the question; a client sends OPT and TSIG, an attacker thousands


class RRset(NamedTuple):
    """The records of one owner and type; `ttl` in seconds, `rdata` in uncompressed wire form."""

    owner: Name
    type: int
    ttl: int
    rdata: Sequence[bytes]


class Answer(NamedTuple):
    """An answer's code and sections; a negative one carries the SOA in `authority` (RFC 2308).

    `outside` is where a chain of CNAMEs leaves the domain: the records of that name are missing
    in `answer`, for a resolver to add.
    """

    rcode: Rcode
    answer: tuple[RRset, ...] = ()
    authority: tuple[RRset, ...] = ()
    additional: tuple[RRset, ...] = ()
    outside: Name | None = None


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


def parse(wire: bytes) -> Query:
    """Read a query of at least 12 octets. Raises dns.exception.DNSException on anything odd."""
    _, flags, questions, *others = HEADER.unpack_from(wire)
    if questions != 1 or sum(others) > _MAX_EXTRA:
        raise FormError
    try:
        name, size = from_wire(wire, HEADER.size)
        offset = HEADER.size + size
        rdtype, rdclass = struct.unpack_from("!HH", wire, offset)
        offset += 4
        # The reply echoes the question's octets and points into them, so no pointers in there.
        query = Query(wire, flags, name, rdtype, rdclass, offset)
        if size != len(to_wire(name)):
            raise FormError
        for _ in range(sum(others)):
            owner, size = from_wire(wire, offset)
            rdtype, payload, ttl, length = RECORD.unpack_from(wire, offset + size)
            offset += size + RECORD.size + length
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
    flags = QR | query.flags & RD | (RA if recursion else 0) | rcode & 15
    if answer.answer or rcode in (NOERROR, NXDOMAIN):
        flags |= AA
    opt = b""
    if query.payload:
        opt = b"\0" + RECORD.pack(OPT, payload, rcode >> 4 << 24 | query.edns_flags & DO, 0)
    out = bytearray(HEADER.size) + query.wire[HEADER.size : query.end]
    counts = [0, 0, 0]
    for number, section in enumerate((answer.answer, answer.authority, answer.additional)):
        for record in _records(section, query.name, turn):
            if len(out) + len(record) + len(opt) > limit:
                flags |= TC if number < 2 else 0  # the additional section may be left out
                break
            out += record
            counts[number] += 1
    counts[2] += bool(opt)
    out[2 : HEADER.size] = HEADER.pack(0, flags, 1, *counts)[2:]
    out[:2] = query.wire[:2]
    return bytes(out + opt)


def render_error(wire: bytes, rcode: Rcode) -> bytes:
    """A reply without a question, to a message of at least 12 octets that was not understood."""
    flags = QR | int.from_bytes(wire[2:4], "big") & (0x7800 | RD) | rcode
    return wire[:2] + HEADER.pack(0, flags, 0, 0, 0, 0)[2:]


def question(name: Name, qtype: int, payload: int) -> Query:
    """A question of our own, for an upstream: recursion desired, `payload` octets taken by UDP."""
    opt = b"\0" + RECORD.pack(OPT, payload, 0, 0)
    asked = to_wire(name) + struct.pack("!HH", qtype, IN)
    return parse(HEADER.pack(0, RD, 1, 0, 0, 1) + asked + opt)


def read_answer(reply: bytes, qtype: int) -> tuple[Rcode, tuple[RRset, ...]]:
    """The code of a reply, and its CNAMEs and records of `qtype`, one to an RRset.

    For types whose data holds no names, as A and AAAA. Raises DNSException or struct.error.
    """
    _, flags, questions, answers, *_ = HEADER.unpack_from(reply)
    offset = HEADER.size
    for _ in range(questions):
        offset += from_wire(reply, offset)[1] + 4
    found = []
    for _ in range(answers):
        owner, size = from_wire(reply, offset)
        rdtype, rdclass, ttl, length = RECORD.unpack_from(reply, offset + size)
        start = offset + size + RECORD.size
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
            pointer = 0xC000 | HEADER.size + len(to_wire(question)) - shared
            start = start[: len(start) - shared] + pointer.to_bytes(2, "big")
        for i in range(len(rdata)):
            data = rdata[(i + turn) % len(rdata)]
            yield start + RECORD.pack(rdtype, IN, ttl, len(data)) + data


def to_wire(name: Name) -> bytes:
    """A name as uncompressed record data (RFC 1035, 3.1)."""
    return b"".join(map(string, name.labels))


def string(text: bytes) -> bytes:
    """A label or character-string: its length in one octet, then its octets."""
    return bytes((len(text),)) + text
