"""One module as the compiler left it: programs, the maps that they need, the types of those.

Nothing in it belongs to one node, one kernel or one pin directory: maps are told by their names.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import msgspec

_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1  # include/uapi/linux/bpf.h


class Map(msgspec.Struct, frozen=True):
    """What the kernel is asked for. `entries` counts only for maps that bpf/maps.h does not have;
    `key_type` and `value_type` are ids of Compiled.types, 0 for a map without."""

    name: str
    type: int
    key_size: int
    value_size: int
    entries: int
    flags: int
    key_type: int
    value_type: int


class Compiled(msgspec.Struct, frozen=True):
    """`programs` are instructions by name, in which a map is its place in `maps`; `types` is raw
    BTF. `refused_by`: the kernel that did not take it when it was new, "" for none."""

    maps: tuple[Map, ...]
    programs: dict[str, bytes]
    types: bytes
    license: str
    refused_by: str = ""


def relocated(instructions: bytes, numbers: Mapping[int, int]) -> bytes:
    """With another number for each map. Raises KeyError for one that has none."""
    out = bytearray(instructions)
    at = 0
    while at < len(out):
        code, registers, _offset, number = struct.unpack_from("=BBhi", out, at)
        if code == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            struct.pack_into("=i", out, at + 4, numbers[number])
        at += 16 if code == _LD_IMM64 else 8
    return bytes(out)


def encode(value: Compiled) -> bytes:
    """As a file has it: a checksum, then the value."""
    text = msgspec.msgpack.encode(value)
    return hashlib.sha256(text).digest() + text


def decode(data: bytes) -> Compiled:
    """Raises ValueError for what `encode` did not give."""
    digest, text = data[:32], data[32:]
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("it is damaged")
    return msgspec.msgpack.decode(text, type=Compiled)
