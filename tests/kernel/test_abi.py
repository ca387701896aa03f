"""One layout, three readers: bpf/abi.h as Python reads it is what the compiler laid out."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from pointsman import abi, bpf, btf
from tests.support.kernel import SMALL, Lab

pytestmark = pytest.mark.kernel

INT, ARRAY, STRUCT, TYPEDEF, VOLATILE, CONST = 1, 3, 4, 8, 9, 10
#: Bytes after the 12 that each type has: (always, for each of vlen).
TAILS = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0),
         15: (0, 12), 17: (4, 0), 19: (0, 12)}  # fmt: skip


class Type(NamedTuple):
    name: str
    kind: int
    vlen: int
    value: int  # size, or the type that it stands for
    tail: bytes


class Types:
    """BTF read a second time and whole, so that `pointsman.btf` is tested as well."""

    def __init__(self, data: bytes) -> None:
        header, types_at, types_size, strings_at, _ = struct.unpack_from("=4xIIIII", data)
        self._strings = data[header + strings_at :]
        self.types = [Type("void", 0, 0, 0, b"")]
        at, end = header + types_at, header + types_at + types_size
        while at < end:
            name, info, value = struct.unpack_from("=III", data, at)
            kind, vlen = info >> 24 & 31, info & 0xFFFF
            always, each = TAILS.get(kind, (0, 0))
            size = always + each * vlen
            tail = data[at + 12 : at + 12 + size]
            self.types.append(Type(self._text(name), kind, vlen, value, tail))
            at += 12 + size

    def _text(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()

    def plain(self, ident: int) -> Type:
        found = self.types[ident]
        while found.kind in (TYPEDEF, VOLATILE, CONST):
            found = self.types[found.value]
        return found

    def size(self, ident: int) -> int:
        found = self.plain(ident)
        if found.kind == ARRAY:
            element, _, count = struct.unpack("=III", found.tail)
            return self.size(element) * count
        return found.value

    def element(self, ident: int) -> Type:
        """What an array is of; the type itself if it is none."""
        found = self.plain(ident)
        return self.plain(struct.unpack("=III", found.tail)[0]) if found.kind == ARRAY else found

    def members(self, of: Type) -> list[tuple[str, int, int]]:
        """(name, type, offset in bytes) of a struct."""
        found = [struct.unpack_from("=III", of.tail, 12 * i) for i in range(of.vlen)]
        return [(self._text(name), ident, bits // 8) for name, ident, bits in found]


def specs(lab: Lab) -> dict[str, abi.MapSpec]:
    features = ["HAVE_MPTCP"] if (lab.loaded.generation.maps / "mptcp").exists() else []
    return abi.map_specs(SMALL.definitions(), features)


def pinned_types(lab: Lab, name: str) -> tuple[Types, Type, bytes, bpf.MapInfo]:
    info = lab.maps.map(name).info
    assert info.btf_id, f"{name} carries no BTF"
    data = bpf.btf(info.btf_id)
    types = Types(data)
    return types, types.plain(info.btf_value_type_id), data, info


def check(types: Types, laid_out: Type, layout: abi.Layout, path: str) -> None:
    """This struct and the structs in it, field by field."""
    assert laid_out.kind == STRUCT, f"{path} is no struct to the compiler"
    assert laid_out.name == layout.name
    wanted = [(field.name, field.offset, field.size) for field in layout.fields]
    actual = [(name, at, types.size(ident)) for name, ident, at in types.members(laid_out)]
    assert wanted == actual, path
    assert layout.size == laid_out.value, f"size of {path}"
    for field, (_, ident, _) in zip(layout.fields, types.members(laid_out), strict=True):
        if (inner := abi.layouts().get(field.type)) is not None:
            assert inner.size * (field.count or 1) == field.size
            check(types, types.element(ident), inner, f"{path}.{field.name}")


def test_every_map_of_maps_h_is_pinned_and_no_other(lab: Lab) -> None:
    assert sorted(specs(lab)) == lab.maps.names_of_maps


@pytest.mark.parametrize("name", abi.map_specs(SMALL.definitions(), ["HAVE_MPTCP"]))
def test_a_pinned_map_has_the_type_sizes_and_flags_of_its_spec(lab: Lab, name: str) -> None:
    spec = specs(lab).get(name)
    if spec is None:
        pytest.skip("needs Linux 5.19 (bpf_skc_to_mptcp_sock)")
    info = lab.maps.map(name).info
    wanted = (spec.type, spec.key_size, spec.value_size, spec.entries, spec.flags)
    flags = info.flags & ~bpf.BPF_F_RDONLY
    assert (info.type, info.key_size, info.value_size, info.max_entries, flags) == wanted


@pytest.mark.parametrize(
    "name", [n for n, s in abi.map_specs(SMALL.definitions(), ["HAVE_MPTCP"]).items() if s.value]
)
def test_python_reads_a_value_where_the_compiler_laid_it_out(lab: Lab, name: str) -> None:
    spec = specs(lab).get(name)
    if spec is None:
        pytest.skip("needs Linux 5.19 (bpf_skc_to_mptcp_sock)")
    assert spec.value is not None
    types, laid_out, data, info = pinned_types(lab, name)
    check(types, laid_out, spec.value, name)
    assert info.value_size == spec.value.size
    # And the reader that compares a pinned map with what is expected sees the same.
    members = btf.members(data, info.btf_value_type_id)
    assert [tuple(member) for member in members] == [
        (field.name, field.offset) for field in spec.value.fields
    ]


def test_the_key_of_a_frontend_is_laid_out_as_python_packs_it(lab: Lab) -> None:
    """The key is a struct too; the copy of it in struct service shows how it is laid out."""
    types, service, _, _ = pinned_types(lab, "services")
    ident = next(ident for name, ident, _ in types.members(service) if name == "key")
    layout = abi.layouts()["frontend_key"]
    check(types, types.plain(ident), layout, "frontend_key")
    assert lab.maps.map("frontends").info.key_size == layout.size


def test_an_element_of_a_mapped_array_stands_where_its_stride_says(lab: Lab) -> None:
    lab.serve("10.96.9.1", 80, 6, ("10.244.0.1", 8080))
    for name in ("services", "slots", "load"):
        spec = specs(lab)[name]
        mapped = getattr(lab.maps, f"_{name}")
        assert mapped.stride == spec.stride
        read = lab.maps.map(name)
        for index in range(8):
            memory = bytes(mapped.memory[index * spec.stride :][: spec.value_size])
            assert memory == read.lookup(struct.pack("=I", index)), f"{name}[{index}]"
