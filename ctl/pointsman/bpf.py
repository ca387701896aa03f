"""BPF objects in the kernel, through libbpf. The only module that calls bpf(2).

Errors are `OSError` with the kernel's errno and what was tried. File descriptors are plain ints
owned by whoever asked for them; `Map` closes its own.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BPF_F_RDONLY = 1 << 3
_BATCH = 4096
_SCHED_CLS = 3  # BPF_PROG_TYPE_…
#: Of the kernel's own numbers: it has no batches for this type of map (an LPM trie before 5.13).
_ENOTSUPP = 524
#: A map that takes no more.
_FULL = (errno.E2BIG, errno.ENOSPC)


def _load(names: tuple[str, ...]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError:
            continue
    raise OSError(errno.ENOENT, f"{names[0]} not found; install the package that carries it")


_libbpf = _load(("libbpf.so.1", "libbpf.so.0"))
_libatomic = _load(("libatomic.so.1",))

# Plain stores from Python are not ordered on arm64; these are release stores.
_RELEASE = 3
_store_8 = _libatomic["__atomic_store_8"]
_store_8.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
_store_8.restype = None


def _check(result: int, what: str) -> int:
    """libbpf ≥ 1.0 returns -errno, and sets errno as well."""
    if result < 0:
        number = -result if result != -1 or not ctypes.get_errno() else ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return int(result)


class _GetOpts(ctypes.Structure):
    _fields_ = [("sz", ctypes.c_size_t), ("file_flags", ctypes.c_uint32), ("pad", ctypes.c_uint32)]


class _BatchOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    ]


class _LinkOpts(ctypes.Structure):
    _fields_ = [("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32), ("pad", ctypes.c_uint32)]


class _ProgramOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
    ]


class _RunOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    ]


def obj_get(path: Path, *, read_only: bool = False) -> int:
    """The file descriptor of a pinned object. Programs and links can't be opened read-only."""
    options = _GetOpts(ctypes.sizeof(_GetOpts), BPF_F_RDONLY if read_only else 0, 0)
    result = _libbpf.bpf_obj_get_opts(os.fsencode(path), ctypes.byref(options))
    return _check(result, f"open {path}")


def obj_pin(fd: int, path: Path) -> None:
    _check(_libbpf.bpf_obj_pin(fd, os.fsencode(path)), f"pin {path}")


def _info(fd: int, size: int = 256) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    length = ctypes.c_uint32(size)
    _check(_libbpf.bpf_obj_get_info_by_fd(fd, buffer, ctypes.byref(length)), "object info")
    return buffer.raw


@dataclass(frozen=True, slots=True)
class MapInfo:
    """struct bpf_map_info, what matters of it."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int
    btf_key_type_id: int
    btf_value_type_id: int


def map_info(fd: int) -> MapInfo:
    raw = _info(fd)
    kind, ident, key, value, entries, flags, name = struct.unpack_from("=6I16s", raw)
    # ifindex, btf_vmlinux_value_type_id, netns_dev, netns_ino stand between the name and the BTF.
    types = struct.unpack_from("=III", raw, 64)
    text = name.split(b"\0")[0].decode()
    return MapInfo(kind, ident, key, value, entries, flags, text, *types)


def btf(btf_id: int) -> bytes:
    """The raw type information of that id (format: Documentation/bpf/btf.rst)."""
    fd = _check(_libbpf.bpf_btf_get_fd_by_id(btf_id), f"BTF {btf_id}")
    try:
        size = struct.unpack_from("=QI", _info(fd))[1]
        data = ctypes.create_string_buffer(size)
        info = struct.pack("=QII", ctypes.addressof(data), size, 0) + bytes(16)
        buffer = ctypes.create_string_buffer(info)
        length = ctypes.c_uint32(len(info))
        _check(_libbpf.bpf_obj_get_info_by_fd(fd, buffer, ctypes.byref(length)), "BTF info")
        return data.raw
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    id: int
    tag: str
    name: str
    run_time_ns: int
    run_cnt: int
    verified: int  # instructions that the verifier went through; 0: not known (before Linux 5.16)


def program_info(fd: int) -> ProgramInfo:
    """struct bpf_prog_info; the run time only counts while kernel.bpf_stats_enabled is 1."""
    raw = _info(fd)
    _kind, ident, tag = struct.unpack_from("=II8s", raw)
    name = raw[64:80].split(b"\0")[0].decode()
    run_time, runs, _misses, verified = struct.unpack_from("=QQQI", raw, 192)
    return ProgramInfo(ident, tag.hex(), name, run_time, runs, verified)


def program_maps(program: int) -> list[MapInfo]:
    """Those that a program (by its id) reads or writes; none if it is gone."""
    fd = _libbpf.bpf_prog_get_fd_by_id(program)
    if fd < 0 and ctypes.get_errno() == errno.ENOENT:
        return []
    _check(fd, f"program {program}")
    try:
        ids = (ctypes.c_uint32 * 64)()  # MAX_USED_MAPS
        info = struct.pack("=52xIQ", len(ids), ctypes.addressof(ids)).ljust(256, b"\0")
        buffer = ctypes.create_string_buffer(info, len(info))
        length = ctypes.c_uint32(len(info))
        _check(_libbpf.bpf_obj_get_info_by_fd(fd, buffer, ctypes.byref(length)), "program info")
        (count,) = struct.unpack_from("=I", buffer.raw, 52)
    finally:
        os.close(fd)
    return [_map_by_id(ident) for ident in ids[:count]]


def _map_by_id(ident: int) -> MapInfo:
    fd = _check(_libbpf.bpf_map_get_fd_by_id(ident), f"map {ident}")
    try:
        return map_info(fd)
    finally:
        os.close(fd)


def link_program(fd: int) -> int:
    """The id of the program that a link runs."""
    return int(struct.unpack_from("=III", _info(fd))[2])


def link_cgroup(fd: int) -> int:
    """The id (inode) of the cgroup that a link is attached to; 0 = that cgroup is gone."""
    return int(struct.unpack_from("=IIIIQ", _info(fd))[4])


def link_device(fd: int) -> int:
    """The ifindex of the device that an XDP or tcx link is attached to; 0 = that device is gone."""
    return int(struct.unpack_from("=IIIII", _info(fd))[4])


def has_helper(program_type: int, helper: int) -> bool:
    """Whether programs of that type (BPF_PROG_TYPE_…) may call it (BPF_FUNC_…), by trying."""
    return bool(_libbpf.libbpf_probe_bpf_helper(program_type, helper, None) == 1)


def link_create(program: int, target: int, attach_type: int, flags: int = 0) -> int:
    """`target` is a file descriptor, or the ifindex of a device of this network namespace."""
    options = _LinkOpts(ctypes.sizeof(_LinkOpts), flags)
    result = _libbpf.bpf_link_create(
        program, target, attach_type, ctypes.byref(options) if flags else None
    )
    return _check(result, "attach")


def link_detach(link: int) -> None:
    """Detaches at once; a link that is only closed or unpinned may run a moment longer."""
    _check(_libbpf.bpf_link_detach(link), "detach")


def link_update(link: int, program: int) -> None:
    """Replaces the link's program; each run of the hook sees the old one or the new one."""
    _check(_libbpf.bpf_link_update(link, program, None), "replace the program of a link")


def run(program: int, data: bytes) -> int:
    """One BPF_PROG_TEST_RUN with `data` as its packet; the program's return value."""
    buffer = ctypes.create_string_buffer(data, len(data))
    options = _RunOpts(sz=ctypes.sizeof(_RunOpts))
    options.data_in = ctypes.addressof(buffer)
    options.data_size_in = len(data)
    options.repeat = 1
    _check(_libbpf.bpf_prog_test_run_opts(program, ctypes.byref(options)), "run a program")
    return int(options.retval)


def program_load(kind: int, name: str, license: str, instructions: bytes, attach_type: int) -> int:
    """A program (BPF_PROG_TYPE_…, BPF_…) that the verifier takes; `instructions` have file
    descriptors of maps."""
    options = _ProgramOpts(ctypes.sizeof(_ProgramOpts), 0, attach_type)
    result = _libbpf.bpf_prog_load(
        kind,
        name.encode(),
        license.encode(),
        instructions,
        ctypes.c_size_t(len(instructions) // 8),
        ctypes.byref(options),
    )
    return _check(result, f"load program {name}")


def compares_and_swaps() -> bool:
    """Whether programs may compare and swap, by trying."""
    insns = (
        struct.pack("=BBhi", 0xB7, 0x00, 0, 0),  # r0 = 0
        struct.pack("=BBhi", 0x7B, 0x0A, -8, 0),  # *(u64 *)(r10 - 8) = r0
        struct.pack("=BBhi", 0xDB, 0x0A, -8, 0xF1),  # r0 = cmpxchg(r10 - 8, r0, r0)
        struct.pack("=BBhi", 0xB7, 0x00, 0, 0),
        struct.pack("=BBhi", 0x95, 0x00, 0, 0),  # exit
    )
    try:
        os.close(program_load(_SCHED_CLS, "swaps", "GPL", b"".join(insns), 0))
    except OSError:
        return False
    return True


def btf_load(data: bytes) -> int:
    """Raw type information, for maps to be created with."""
    return _check(_libbpf.bpf_btf_load(data, ctypes.c_size_t(len(data)), None), "load BTF")


def map_create(
    kind: int,
    name: str,
    key: int,
    value: int,
    entries: int,
    inner: int = -1,
    flags: int = 0,
    types: tuple[int, int, int] | None = None,
) -> int:
    """A new map. `inner`: a map-in-map's template; `flags`: BPF_F_… of creation; `types`: BTF as a
    file descriptor, and the ids of key and value in there."""

    class Options(ctypes.Structure):
        _fields_ = [
            ("sz", ctypes.c_size_t),
            ("btf_fd", ctypes.c_uint32),
            ("btf_key_type_id", ctypes.c_uint32),
            ("btf_value_type_id", ctypes.c_uint32),
            ("btf_vmlinux_value_type_id", ctypes.c_uint32),
            ("inner_map_fd", ctypes.c_uint32),
            ("map_flags", ctypes.c_uint32),
            ("map_extra", ctypes.c_uint64),
            ("numa_node", ctypes.c_uint32),
            ("map_ifindex", ctypes.c_uint32),
        ]

    options = Options(sz=ctypes.sizeof(Options), map_flags=flags)
    if inner >= 0:
        options.inner_map_fd = inner
    if types:
        options.btf_fd, options.btf_key_type_id, options.btf_value_type_id = types
    result = _libbpf.bpf_map_create(kind, name.encode(), key, value, entries, ctypes.byref(options))
    return _check(result, f"create map {name}")


def possible_cpus() -> int:
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.replace("-", ",").split(",")[-1]) + 1


class Map:
    """One map by its file descriptor. Keys and values are bytes of exactly the map's sizes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = map_info(fd)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Map:
        return cls(obj_get(path, read_only=read_only))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def lookup(self, key: bytes, size: int | None = None) -> bytes | None:
        """None if there is no such key. `size` for per-CPU maps: 8-byte aligned value × CPUs."""
        value = ctypes.create_string_buffer(size or self.info.value_size)
        result = _libbpf.bpf_map_lookup_elem(self.fd, key, value)
        if result < 0 and ctypes.get_errno() == errno.ENOENT:
            return None
        _check(result, f"read {self.info.name}")
        return value.raw

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        result = _libbpf.bpf_map_update_elem(self.fd, key, value, ctypes.c_uint64(flags))
        _check(result, f"write {self.info.name}")

    def delete(self, key: bytes) -> bool:
        """False if there was no such key."""
        result = _libbpf.bpf_map_delete_elem(self.fd, key)
        if result < 0 and ctypes.get_errno() == errno.ENOENT:
            return False
        _check(result, f"remove an element of {self.info.name}")
        return True

    def update_batch(self, keys: bytes, values: bytes) -> int:
        """Writes all, in one call where the kernel can; the number written. Less than all if the
        map is full."""
        total = len(keys) // self.info.key_size
        count = ctypes.c_uint32(total)
        options = _BatchOpts(ctypes.sizeof(_BatchOpts), 0, 0)
        result = _libbpf.bpf_map_update_batch(
            self.fd, keys, values, ctypes.byref(count), ctypes.byref(options)
        )
        number = ctypes.get_errno() if result < 0 else 0
        if number == _ENOTSUPP:
            return self._update_each(keys, values)
        if number in _FULL:
            return int(count.value)
        _check(result, f"write {self.info.name}")
        return total

    def _update_each(self, keys: bytes, values: bytes) -> int:
        size = self.info.value_size
        for done, key in enumerate(self._split(keys)):
            try:
                self.update(key, values[done * size : (done + 1) * size])
            except OSError as error:
                if error.errno in _FULL:
                    return done
                raise
        return len(keys) // self.info.key_size

    def _split(self, keys: bytes) -> Iterator[bytes]:
        size = self.info.key_size
        return (keys[at : at + size] for at in range(0, len(keys), size))

    def delete_batch(self, keys: bytes) -> None:
        """Deletes all; a key that is not there is passed over."""
        size = self.info.key_size
        at = 0
        while at < len(keys):
            count = ctypes.c_uint32((len(keys) - at) // size)
            options = _BatchOpts(ctypes.sizeof(_BatchOpts), 0, 0)
            result = _libbpf.bpf_map_delete_batch(
                self.fd, keys[at:], ctypes.byref(count), ctypes.byref(options)
            )
            number = ctypes.get_errno() if result < 0 else 0
            if number == _ENOTSUPP:
                for key in self._split(keys):
                    self.delete(key)
                return
            if number not in (0, errno.ENOENT):
                _check(result, f"remove an element of {self.info.name}")
            if result >= 0:
                return
            at += (count.value + 1) * size  # the one after the last deleted was not there

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value (not for per-CPU maps)."""
        key_size, value_size = self.info.key_size, self.info.value_size
        for count, keys, values in self.scan():
            raw_keys, raw_values = bytes(keys), bytes(values)
            for i in range(count):
                yield (
                    raw_keys[i * key_size : (i + 1) * key_size],
                    raw_values[i * value_size : (i + 1) * value_size],
                )

    def values(self) -> bytes:
        """All elements of an array map, one after the other."""
        return b"".join(bytes(values) for _, _, values in self.scan())

    def scan(self, room: int = _BATCH) -> Iterator[tuple[int, memoryview, memoryview]]:
        """(count, keys, values), some `room` elements and one syscall each where the kernel can
        (not for per-CPU maps).
        Both views are of the same memory each time: what is to last has to be copied.

        Elements that come or go meanwhile may be missed or come twice.
        """
        room = min(room, max(self.info.max_entries, 64))
        key_size, value_size = self.info.key_size, self.info.value_size
        # The cursor is a bucket number or a key, whatever the map type makes of it.
        cursor = ctypes.create_string_buffer(max(key_size, 8))
        keys, values = bytearray(key_size * room), bytearray(value_size * room)
        first = True
        while True:
            count = ctypes.c_uint32(room)
            options = _BatchOpts(ctypes.sizeof(_BatchOpts), 0, 0)
            result = _libbpf.bpf_map_lookup_batch(
                self.fd,
                None if first else cursor,
                cursor,
                (ctypes.c_char * len(keys)).from_buffer(keys),
                (ctypes.c_char * len(values)).from_buffer(values),
                ctypes.byref(count),
                ctypes.byref(options),
            )
            number = ctypes.get_errno() if result < 0 else 0
            if number == errno.ENOSPC:
                room *= 4  # one bucket holds more than fits
                keys, values = bytearray(key_size * room), bytearray(value_size * room)
                continue
            if number == _ENOTSUPP:
                yield from self._walk()
                return
            if number not in (0, errno.ENOENT):
                _check(result, f"read {self.info.name}")
            found = count.value
            yield (
                found,
                memoryview(keys)[: found * key_size],
                memoryview(values)[: found * value_size],
            )
            if number == errno.ENOENT:
                return
            first = False

    def _walk(self) -> Iterator[tuple[int, memoryview, memoryview]]:
        """As `scan`, an element at a time."""
        key = ctypes.create_string_buffer(self.info.key_size)
        before = None
        while True:
            result = _libbpf.bpf_map_get_next_key(self.fd, before, key)
            if result < 0 and ctypes.get_errno() == errno.ENOENT:
                return
            _check(result, f"read {self.info.name}")
            before = key.raw
            if (value := self.lookup(before)) is not None:
                yield 1, memoryview(before), memoryview(value)

    def __len__(self) -> int:
        return sum(1 for _ in self.items())


class Copy:
    """An array map as it was at one moment. What a read-only descriptor allows: the kernel maps
    memory of writable ones only (EINVAL), even for reading."""

    def __init__(self, source: Map) -> None:
        self.value_size = self.stride = source.info.value_size
        self.entries = source.info.max_entries
        self.memory = source.values()

    def close(self) -> None:
        self.memory = b""


class Array:
    """An array map in this process's memory. Elements are `stride` bytes apart."""

    def __init__(self, source: Map, *, read_only: bool = False) -> None:
        self.value_size = source.info.value_size
        self.stride = -(-self.value_size // 8) * 8
        self.entries = source.info.max_entries
        length = -(-self.stride * self.entries // mmap.PAGESIZE) * mmap.PAGESIZE
        access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        self.memory = mmap.mmap(source.fd, length, mmap.MAP_SHARED, access)
        self._anchor: Any = None
        if not read_only:
            self._anchor = ctypes.c_char.from_buffer(self.memory)
            self._address = ctypes.addressof(self._anchor)

    def write(self, index: int, data: bytes) -> None:
        """Plain stores: only for elements that no program reads yet. One or more elements."""
        at = index * self.stride
        self.memory[at : at + len(data)] = data

    def store_u64(self, index: int, offset: int, value: int) -> None:
        """One 64-bit release store: everything written before it is seen before it."""
        _store_8(self._address + index * self.stride + offset, value, _RELEASE)

    def close(self) -> None:
        self._anchor = None
        self.memory.close()


_Sample = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)
_libbpf.ring_buffer__new.restype = ctypes.c_void_p
_libbpf.ring_buffer__new.argtypes = [ctypes.c_int, _Sample, ctypes.c_void_p, ctypes.c_void_p]
for _name in ("ring_buffer__consume", "ring_buffer__epoll_fd", "ring_buffer__free"):
    _libbpf[_name].argtypes = [ctypes.c_void_p]


class RingBuffer:
    """Reads what programs write to a ring buffer map. There can be one reader only: the position
    of reading belongs to the map, not to who reads.

    `source` must have been opened for writing, since that position is written.
    """

    def __init__(self, source: Map, *, most: int = 1024) -> None:
        """`most`: records of one `read`."""
        self._most = most
        self._records: list[bytes] = []
        self._sample = _Sample(self._take)  # must live as long as libbpf calls it
        # The positions of reader and writer, a page each, as 64-bit numbers.
        page = mmap.PAGESIZE
        self._positions = mmap.mmap(source.fd, 2 * page, mmap.MAP_SHARED, mmap.PROT_READ)
        self._ring = _libbpf.ring_buffer__new(source.fd, self._sample, None, None)
        if not self._ring:
            number = ctypes.get_errno()
            raise OSError(number, f"read ring buffer {source.info.name}: {os.strerror(number)}")
        self._poll = select.poll()
        self._poll.register(_libbpf.ring_buffer__epoll_fd(self._ring), select.POLLIN)

    def _take(self, _context: object, data: Any, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        # Below zero ends libbpf's loop, after this record: under load it would never end.
        return 0 if len(self._records) < self._most else -errno.EAGAIN

    def pending(self) -> int:
        """Bytes that are written and not read, headers included."""
        reader = int(struct.unpack_from("=Q", self._positions)[0])
        writer = int(struct.unpack_from("=Q", self._positions, mmap.PAGESIZE)[0])
        return writer - reader

    def read(self, seconds: float) -> list[bytes]:
        """The next records; waits for the first. Records outlive the reader before this one."""
        if not self.pending():
            self._poll.poll(seconds * 1000)
        self._records = []
        result = _libbpf.ring_buffer__consume(self._ring)
        if result < 0 and len(self._records) < self._most:
            _check(result, "read a ring buffer")
        return self._records

    def close(self) -> None:
        if self._ring:
            _libbpf.ring_buffer__free(self._ring)
            self._ring = None
            self._positions.close()
