"""Just enough of io_uring (io_uring_setup(2), x86-64 and arm64 numbers) for one connect."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct

_SETUP, _ENTER = 425, 426
_OP_CONNECT = 16
_libc = ctypes.CDLL(None, use_errno=True)


class Ring:
    """A ring of one entry. Raises OSError where the kernel has or allows no io_uring."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._fd = _libc.syscall(_SETUP, 1, parameters)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raw = parameters.raw
        entries, completions = struct.unpack_from("=II", raw)
        self._sq = struct.unpack_from("=7I", raw, 40)  # head tail mask entries flags dropped array
        self._cq = struct.unpack_from("=5I", raw, 80)  # head tail mask entries overflow … cqes
        self._cqes = struct.unpack_from("=I", raw, 100)[0]
        self._rings = mmap.mmap(
            self._fd, max(self._sq[6] + 4 * entries, self._cqes + 16 * completions)
        )
        self._entries = mmap.mmap(self._fd, 64 * entries, offset=0x10000000)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: object) -> None:
        self._rings.close()
        self._entries.close()
        os.close(self._fd)

    def connect(self, fd: int, address: str, port: int) -> int:
        """0 or -errno, as the completion says."""
        name = ctypes.create_string_buffer(
            struct.pack("=H", socket.AF_INET)
            + struct.pack("!H", port)
            + socket.inet_aton(address)
            + bytes(8)
        )
        self._entries[:64] = struct.pack(
            "=BBHiQQIIQ24x", _OP_CONNECT, 0, 0, fd, 16, ctypes.addressof(name), 0, 0, 7
        )
        struct.pack_into("=I", self._rings, self._sq[6], 0)
        tail = struct.unpack_from("=I", self._rings, self._sq[1])[0]
        struct.pack_into("=I", self._rings, self._sq[1], tail + 1)
        if _libc.syscall(_ENTER, self._fd, 1, 1, 1, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        head = struct.unpack_from("=I", self._rings, self._cq[0])[0]
        at = self._cqes + 16 * (head & struct.unpack_from("=I", self._rings, self._cq[2])[0])
        return int(struct.unpack_from("=Qi", self._rings, at)[1])
