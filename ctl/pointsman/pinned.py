"""Pinned maps beside each other: whether one is as it should be, and in which generations it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pointsman import abi, bpf, btf
from pointsman.errors import LayoutMismatch
from pointsman.generations import Generation


def share(source: Generation, generation: Generation, names: Iterable[str]) -> None:
    """Pins these maps in another generation, too, as far as they are there and not yet here."""
    for name in names:
        if source.has(name) and not generation.has(name):
            pin_again(source.maps / name, generation.maps / name)


def pin_again(path: Path, to: Path) -> None:
    """Any object under one more name."""
    fd = bpf.obj_get(path)
    try:
        bpf.obj_pin(fd, to)
    finally:
        os.close(fd)


def _info(path: Path) -> bpf.MapInfo:
    opened = bpf.Map.open(path, read_only=True)
    try:
        return opened.info
    finally:
        opened.close()


def map_id(path: Path) -> int:
    return _info(path).id


def same_map(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and map_id(one) == map_id(other)


def previous_load(path: Path) -> dict[str, int]:
    """Where the counts stand in a `load` that these programs would lay out differently."""
    info = _info(path)
    fields = btf.members(bpf.btf(info.btf_id), info.btf_value_type_id) if info.btf_id else ()
    offsets = {member.name: member.offset for member in fields}
    if "open" not in offsets:
        raise LayoutMismatch(
            f"{path}: no field 'open' to take the connection counts from; run 'pointsman unload'"
        )
    return {
        "PREVIOUS_LOAD_SIZE": info.value_size,
        "PREVIOUS_LOAD_ENTRIES": info.max_entries,
        "PREVIOUS_LOAD_OPEN": offsets["open"],
    }


def differences(spec: abi.MapSpec, path: Path, *, sizes: bool = True) -> list[str]:
    """Every way in which a pinned map is not what the specification says. Without `sizes` it may
    have another number of elements."""
    info = _info(path)
    found = [
        f"{spec.name}: {what} {wanted}, pinned map has {actual}"
        for what, wanted, actual in (
            ("type", spec.type, info.type),
            ("key size", spec.key_size, info.key_size),
            ("value size", spec.value_size, info.value_size),
            ("max entries", spec.entries if sizes else info.max_entries, info.max_entries),
            ("flags", spec.flags, info.flags & ~bpf.BPF_F_RDONLY),
        )
        if wanted != actual
    ]
    if spec.value is None:
        return found
    if not info.btf_value_type_id:
        return [*found, f"{spec.name}: no type information (BTF), so it is not Pointsman's"]
    pinned = btf.members(bpf.btf(info.btf_id), info.btf_value_type_id)
    actual_fields = {member.name: member.offset for member in pinned}
    wanted_fields = {field.name: field.offset for field in spec.value.fields}
    for name in sorted(wanted_fields.keys() | actual_fields.keys()):
        wanted_at, actual_at = wanted_fields.get(name), actual_fields.get(name)
        if wanted_at != actual_at:
            found.append(
                f"{spec.name}: field {name} {_at(wanted_at)}, pinned map has it {_at(actual_at)}"
            )
    return found


def _at(offset: int | None) -> str:
    return "nowhere" if offset is None else f"at byte {offset}"
