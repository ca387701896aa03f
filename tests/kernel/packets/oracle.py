"""What a frame is, told by somebody who did not write the programs.

Which of its bytes a translation may change, and by how much each of its checksums is wrong. A
translation that amends checksums by what it changes leaves that as it was, also where it was wrong
before, or where part of a packet is missing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

_TCP, _UDP, _ICMP, _ICMPV6, _FRAGMENT = 6, 17, 1, 58, 44
_EXTENSIONS = (0, 43, 60, _FRAGMENT)
_ERRORS = {4: (3, 11, 12), 6: (1, 2, 3, 4)}
_CHECK_AT = {_TCP: 16, _UDP: 6}
_HEADER = {_TCP: 20, _UDP: 8}


def _sum(*parts: bytes) -> int:
    """The folded ones' complement sum, 0xffff as 0: 0 over all of what a right checksum covers."""
    total = 0
    for part in parts:
        padded = part + b"\0" * (len(part) % 2)
        total += sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    return total % 0xFFFF


@dataclass(slots=True)
class Shape:
    """One frame that makes sense. Places are byte numbers of the frame; `errors` says of each
    checksum by how much it is wrong, 0 if it is right; those that are not there are left out."""

    changeable: set[int] = field(default_factory=set)
    errors: dict[str, int] = field(default_factory=dict)
    ttl: int = 0
    l3: int = 0
    ip: bytes = b""
    quoted: bytes = b""  # of an ICMP error
    source: bytes = b""
    destination: bytes = b""

    def is_answered_by(self, other: Shape | None) -> bool:
        """Whether the other one is an ICMP error about this packet, sent to where it came from."""
        return (
            other is not None
            and other.quoted != b""
            and other.destination == self.source
            and self.ip.startswith(other.quoted)
        )


def shape_of(frame: bytes) -> Shape | None:
    """None for what no translation may touch at all."""
    if len(frame) < 14:
        return None
    shape = Shape()
    l3, ethertype = 14, frame[12:14]
    if ethertype == b"\x81\x00":
        if len(frame) < 18:
            return None
        l3, ethertype = 18, frame[16:18]
        shape.changeable |= {14, 15}
    version = {b"\x08\x00": 4, b"\x86\xdd": 6}.get(ethertype)
    if version is None or not _read_ip(frame, l3, version, shape, ""):
        return None
    return shape


def _read_ip(frame: bytes, l3: int, version: int, shape: Shape, where: str) -> bool:
    """Reads the packet at `l3`; `where` is "quoted " for one inside of an ICMP error."""
    read = _read_v4 if version == 4 else _read_v6
    found = read(frame, l3, shape, where)
    if found is None:
        return False
    l4, end, protocol, pseudo, first = found
    if not where:
        shape.l3, shape.ip = l3, frame[l3:end]
    if not first:
        return True
    payload = frame[l4:end]
    if protocol in _HEADER:
        if len(payload) < (_HEADER[protocol] if not where else 4):
            return False
        shape.changeable |= set(range(l4, l4 + 4))
        _read_l4_check(frame, l4, end, protocol, pseudo, shape, where)
        return True
    if protocol == (_ICMP if version == 4 else _ICMPV6) and not where:
        if len(payload) < 8 or payload[0] not in _ERRORS[version]:
            return False
        shape.changeable |= {l4 + 2, l4 + 3}
        shape.errors["l4"] = _sum(pseudo if version == 6 else b"", payload)
        shape.quoted = payload[8:]
        _read_ip(frame[:end], l4 + 8, version, shape, "quoted ")
        return True
    return False


def _read_l4_check(
    frame: bytes, l4: int, end: int, protocol: int, pseudo: bytes, shape: Shape, where: str
) -> None:
    at = l4 + _CHECK_AT[protocol]
    if at + 2 > end:
        return
    if protocol == _UDP and frame[at : at + 2] == b"\0\0":
        shape.errors[f"{where}none"] = 0
        return
    shape.changeable |= {at, at + 1}
    shape.errors[f"{where}l4"] = _sum(pseudo, frame[l4:end])


def _read_v4(
    frame: bytes, l3: int, shape: Shape, where: str
) -> tuple[int, int, int, bytes, bool] | None:
    header = frame[l3 : l3 + 20]
    if len(header) < 20 or header[0] >> 4 != 4 or header[0] & 15 < 5:
        return None
    size = (header[0] & 15) * 4
    length = int.from_bytes(header[2:4], "big")
    end = min(l3 + length, len(frame))
    if not where and (length < size or l3 + length > len(frame)):
        return None
    if l3 + size > end and not where:
        return None
    shape.changeable |= set(range(l3 + 10, l3 + 20))
    shape.errors[f"{where}ip"] = _sum(frame[l3 : l3 + size])
    if not where:
        shape.changeable.add(l3 + 8)
        shape.ttl = l3 + 8
        shape.source, shape.destination = header[12:16], header[16:20]
    offset = int.from_bytes(header[6:8], "big") & 0x1FFF
    pseudo = header[12:20] + struct.pack("!HH", header[9], (length - size) & 0xFFFF)
    return l3 + size, end if not where else len(frame), header[9], pseudo, offset == 0


def _read_v6(
    frame: bytes, l3: int, shape: Shape, where: str
) -> tuple[int, int, int, bytes, bool] | None:
    header = frame[l3 : l3 + 40]
    if len(header) < 40 or header[0] >> 4 != 6:
        return None
    length = int.from_bytes(header[4:6], "big")
    end = l3 + 40 + length
    if end > len(frame) and not where:
        return None
    # A quoted packet is cut off, so its own length says nothing of what is there of it.
    end = len(frame) if where else end
    shape.changeable |= set(range(l3 + 8, l3 + 40))
    if not where:
        shape.changeable.add(l3 + 7)
        shape.ttl = l3 + 7
        shape.source, shape.destination = header[8:24], header[24:40]
    protocol, at, first = header[6], l3 + 40, True
    while protocol in _EXTENSIONS and first:
        if at + 8 > end:
            return None
        following, size = frame[at], (frame[at + 1] + 1) * 8
        if protocol == _FRAGMENT:
            size, first = 8, not int.from_bytes(frame[at + 2 : at + 4], "big") & 0xFFF8
        protocol, at = following, at + size
    if at > end:
        return None
    rest = l3 + 40 + length - at
    pseudo = header[8:40] + struct.pack("!II", rest & 0xFFFFFFFF, protocol)
    return at, end, protocol, pseudo, first
