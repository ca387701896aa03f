"""The layouts that the BPF programs and Python share, read from `bpf/abi.h` and `bpf/maps.h`.

Those headers are the one definition; nothing here is typed twice. Integers are in the machine's
byte order, except `__be16` and `__be32`, which are network order: ports are given and returned as
the raw 16-bit value that C sees (use `socket.htons`), addresses as 16 bytes.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

_PADDING = ("pad", "reserved")
_SCALARS = {"__u8": "B", "__u16": "H", "__be16": "H", "__u32": "I", "__be32": "I", "__u64": "Q"}
_MAP_TYPES = {
    "hash": 1,
    "array": 2,
    "percpu_array": 6,
    "lru_hash": 9,
    "lpm_trie": 11,
    "array_of_maps": 12,
    "sk_storage": 24,
    "ringbuf": 27,
}
_MAP_FLAGS = {"0": 0, "BPF_F_NO_PREALLOC": 1, "BPF_F_MMAPABLE": 1 << 10}


def source_directory() -> Path:
    """The C sources: inside the installed package, or beside `ctl/` in a checkout.

    POINTSMAN_SOURCE names others, for trying a changed data path.
    """
    if chosen := os.environ.get("POINTSMAN_SOURCE"):
        return Path(chosen)
    here = Path(__file__).resolve().parent
    installed = here / "bpf"
    return installed if installed.is_dir() else here.parent.parent / "bpf"


def source(directory: Path, *, packets: bool = False) -> str:
    """One of the two modules as one text: the hooks of sockets, or the programs for `packets`, ""
    where the directory has none. bcc rewrites map calls in the main file only, so local headers
    are put in place; #line keeps file names and line numbers in its messages."""
    names = ("packets.c",) if packets else ("sock.c", "correct.c")
    if packets and not (directory / names[0]).exists():
        return ""
    seen: set[str] = set()

    def inline(name: str) -> list[str]:
        seen.add(name)
        lines = [f'#line 1 "bpf/{name}"']
        for number, line in enumerate((directory / name).read_text().splitlines(), 1):
            match = re.match(r'#include "([\w.]+)"', line)
            if match is None:
                lines.append(line)
            elif match[1] not in seen:
                lines += [*inline(match[1]), f'#line {number + 1} "bpf/{name}"']
        return lines

    return "\n".join([line for name in names for line in inline(name)] + [""])


@dataclass(frozen=True, slots=True)
class Field:
    """One member. `offset` and `size` in bytes; `count` is 0 for what is no array."""

    name: str
    type: str
    count: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """One C struct as the compiler lays it out (natural alignment)."""

    name: str
    fields: tuple[Field, ...]
    size: int
    alignment: int

    def field(self, name: str) -> Field:
        """Raises KeyError."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def moved(self, offsets: Mapping[str, int], size: int) -> Layout:
        """This struct as another version of the header laid it out: without the fields that it
        did not have."""
        kept = (replace(f, offset=offsets[f.name]) for f in self.fields if f.name in offsets)
        ordered = tuple(sorted(kept, key=lambda field: field.offset))
        return Layout(self.name, ordered, size, self.alignment)

    def _struct(self, names: tuple[str, ...]) -> struct.Struct:
        """A codec of the named fields, which must come in the order of the header."""
        codec, at = "=", 0
        for name in names:
            field = self.field(name)
            if field.offset < at:
                raise ValueError(f"struct {self.name}: {name} stands before another named field")
            if field.type in _SCALARS:
                one = _SCALARS[field.type]
                code = f"{field.size}s" if field.count else one
            else:
                code = f"{field.size}s"
            codec += f"{field.offset - at}x{code}"
            at = field.offset + field.size
        return struct.Struct(f"{codec}{self.size - at}x")

    def packer(self, *names: str) -> Callable[..., bytes]:
        """`pack(*values) -> bytes` of the whole struct; the fields that are not named are zero."""
        return self._struct(names).pack

    def reader(self, *names: str) -> Callable[..., tuple[Any, ...]]:
        """`read(buffer, offset=0) -> tuple` of the named fields' values."""
        for name in names:
            self.field(name)
        ordered = tuple(field.name for field in self.fields if field.name in names)
        read = self._struct(ordered).unpack_from
        if ordered == names:
            return read
        pick = itemgetter(*map(ordered.index, names))
        return lambda buffer, offset=0: pick(read(buffer, offset))

    def decode(self, data: bytes, offset: int = 0) -> dict[str, Any]:
        """Every field by name, padding left out; arrays of structs become lists."""
        values: dict[str, Any] = {}
        for field in self.fields:
            if field.name in _PADDING:
                continue
            at = offset + field.offset
            raw = data[at : at + field.size]
            if field.type not in _SCALARS:
                inner = layouts()[field.type]
                items = [inner.decode(raw, i * inner.size) for i in range(field.count or 1)]
                values[field.name] = items if field.count else items[0]
            elif field.count and field.type != "__u64":
                values[field.name] = raw
            elif field.count:
                values[field.name] = list(struct.unpack(f"={field.count}Q", raw))
            else:
                values[field.name] = struct.unpack(f"={_SCALARS[field.type]}", raw)[0]
        return values


@dataclass(frozen=True, slots=True)
class MapSpec:
    """What a map must look like. `entries` is a number, flags and type are the kernel's."""

    name: str
    type: int
    type_name: str
    key_size: int
    value_size: int
    entries: int
    flags: int
    value: Layout | None

    @property
    def stride(self) -> int:
        """Distance of two elements of a mapped array: the kernel aligns each to 8 bytes."""
        return -(-self.value_size // 8) * 8


def _strip_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def _parse(text: str) -> tuple[dict[str, Layout], dict[str, int]]:
    text = _strip_comments(text)
    constants: dict[str, int] = {}
    for body in re.findall(r"enum\s*\w*\s*\{(.*?)\}\s*;", text, re.DOTALL):
        constants |= _numbers(body)
    known: dict[str, Layout] = {}
    for name, body in re.findall(r"struct\s+(\w+)\s*\{(.*?)\}\s*;", text, re.DOTALL):
        known[name] = _layout(name, body, known)
    return known, constants


def _numbers(body: str) -> dict[str, int]:
    """Of an enum, each written out."""
    found = {}
    for line in filter(None, (line.strip() for line in body.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\w+)", line)
        if not match:
            raise ValueError(f"abi.h, an enum: cannot read {line!r}")
        found[match[1]] = int(match[2], 0)
    return found


def _layout(name: str, body: str, known: Mapping[str, Layout]) -> Layout:
    fields: list[Field] = []
    at, widest = 0, 1
    for line in filter(None, (line.strip() for line in body.split(";"))):
        match = re.fullmatch(r"(?:struct\s+)?(\w+)\s+(\w+)(?:\[(\d+)\])?", line)
        if not match:
            raise ValueError(f"abi.h, struct {name}: cannot read {line!r}")
        kind, field, count = match[1], match[2], int(match[3] or 0)
        if kind in _SCALARS:
            unit = alignment = struct.calcsize("=" + _SCALARS[kind])
        else:
            unit, alignment = known[kind].size, known[kind].alignment
        at = -(-at // alignment) * alignment
        fields.append(Field(field, kind, count, at, unit * (count or 1)))
        at += unit * (count or 1)
        widest = max(widest, alignment)
    return Layout(name, tuple(fields), -(-at // widest) * widest, widest)


@cache
def _header(directory: Path) -> tuple[dict[str, Layout], dict[str, int]]:
    return _parse((directory / "abi.h").read_text())


def layouts(directory: Path | None = None) -> dict[str, Layout]:
    """Every struct of abi.h by name."""
    return _header(directory or source_directory())[0]


def constants(directory: Path | None = None) -> dict[str, int]:
    """Every enumerator of abi.h by name."""
    return _header(directory or source_directory())[1]


@cache
def enumerators(name: str, directory: Path | None = None) -> dict[str, int]:
    """Those of one enum of abi.h. Raises KeyError."""
    text = _strip_comments(((directory or source_directory()) / "abi.h").read_text())
    match = re.search(rf"enum\s+{name}\s*\{{(.*?)\}}\s*;", text, re.DOTALL)
    if match is None:
        raise KeyError(name)
    return _numbers(match[1])


def map_specs(
    sizes: Mapping[str, int], features: Iterable[str] = (), directory: Path | None = None
) -> dict[str, MapSpec]:
    """Every map of maps.h by name, for these MAX_… sizes and HAVE_… features."""
    directory = directory or source_directory()
    known, numbers = _header(directory)
    features = frozenset(features)
    text = _strip_comments((directory / "maps.h").read_text())
    specs: dict[str, MapSpec] = {}
    conditions: list[bool] = []
    for line in text.splitlines():
        if match := re.match(r"#ifdef (HAVE_\w+)", line):
            conditions.append(match[1] in features)
        elif line.startswith(("#ifndef", "#if ")):
            conditions.append(True)
        elif line.startswith("#endif"):
            conditions.pop()
        match = re.match(r"MAP\((\w+), (\w+), ([\w ]+), ([\w ]+), (\w+), (\w+)\);", line)
        if ring := re.match(r"RINGBUF\((\w+), (\w+)\);", line):
            parts: tuple[str, ...] = ("ringbuf", ring[1], "void", "void", ring[2], "0")
        elif match:
            parts = match.groups()
        else:
            continue
        if not all(conditions):
            continue
        kind, name, key, value, entries, flags = parts
        value_layout = known.get(value.removeprefix("struct "))
        count = sizes.get(entries, numbers.get(entries))
        specs[name] = MapSpec(
            name=name,
            type=_MAP_TYPES[kind],
            type_name=kind,
            key_size=_size(key, known),
            value_size=_size(value, known),
            entries=int(entries) if count is None else count,
            flags=_MAP_FLAGS[flags],
            value=value_layout,
        )
    return specs


def _size(ctype: str, known: Mapping[str, Layout]) -> int:
    if ctype == "int":
        return 4
    if ctype == "void":  # a ring buffer has neither keys nor values; its entries are bytes
        return 0
    if ctype in _SCALARS:
        return struct.calcsize("=" + _SCALARS[ctype])
    return known[ctype.removeprefix("struct ")].size
