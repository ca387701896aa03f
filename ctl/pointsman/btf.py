"""The part of BTF (Documentation/bpf/btf.rst) that says what a map's value looks like.

Pinned maps carry their types; comparing them field by field tells a changed layout from an equal
one even when the sizes are the same.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF = 1, 2, 3, 4, 5, 6, 8
_FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = 13, 14, 15, 17, 19


class Member(NamedTuple):
    """One member of a struct; `offset` in bytes."""

    name: str
    offset: int


class _Type(NamedTuple):
    name: int
    kind: int
    vlen: int
    size_or_type: int
    at: int  # of what follows the 12 bytes that every type has


def _extra(kind: int, vlen: int) -> int:
    """Bytes after the common part, by kind."""
    fixed = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
    each = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
    return fixed.get(kind, each.get(kind, 0) * vlen)


def members(data: bytes, type_id: int) -> tuple[Member, ...]:
    """The members of that struct; () if it is no struct."""
    _magic, _version, _flags, header, types_at, types_len, strings_at = struct.unpack_from(
        "=HBBIIII", data
    )
    types: list[_Type] = [_Type(0, 0, 0, 0, 0)]
    at = header + types_at
    end = at + types_len
    while at < end:
        name, info, size_or_type = struct.unpack_from("=III", data, at)
        kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
        types.append(_Type(name, kind, vlen, size_or_type, at + 12))
        at += 12 + _extra(kind, vlen)
    found = types[type_id]
    while found.kind == _TYPEDEF:
        found = types[found.size_or_type]
    if found.kind != _STRUCT:
        return ()
    result = []
    for i in range(found.vlen):
        name, _type, bits = struct.unpack_from("=III", data, found.at + 12 * i)
        start = header + strings_at + name
        text = data[start : data.index(b"\0", start)].decode()
        result.append(Member(text, (bits & 0xFFFFFF) // 8))
    return tuple(result)
