"""Netlink over a plain socket: requests, and the kernel's answers to them."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

from pointsman.values import V4_PREFIX, Address

_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300  # NLM_F_…
_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR: what is listed changed meanwhile, some may be missing
_TRIES = 10
_ERROR, _DONE = 2, 3  # NLMSG_…
_header = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_s32 = struct.Struct("=i")
_attribute = struct.Struct("=HH")  # struct nlattr


class Netlink:
    """One request after the other. Messages are pyroute2's."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family
        )
        self._sequence = 0
        self._interrupted = False

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _send(self, message: Any, kind: int, flags: int) -> None:
        self._sequence += 1
        header = message["header"]
        header["type"], header["flags"] = kind, flags | _REQUEST
        header["sequence_number"] = self._sequence
        message.encode()
        self._socket.send(message.data)

    def send(self, payload: bytes, kind: int, flags: int = 0) -> None:
        """A change, confirmed by the kernel, as bytes: for what pyroute2 has no message. Raises
        OSError."""
        self._send_raw(payload, kind, flags | _ACK)
        for _ in self._answers():
            pass

    def ask(self, payload: bytes, kind: int) -> list[tuple[bytes, int, int]]:
        """As `dump`, of a request as bytes, and whole: asked again if it changed meanwhile."""
        for _ in range(_TRIES):
            self._send_raw(payload, kind, _DUMP)
            self._interrupted = False
            found = [(data, at, length) for _, data, at, length in self._answers()]
            if not self._interrupted:
                return found
        raise OSError(
            errno.EAGAIN, f"a list of the kernel's changed while it was read, {_TRIES} times"
        )

    def one(self, payload: bytes, kind: int) -> Iterator[tuple[bytes, int, int]]:
        """As `dump`, of what has one answer instead of a list."""
        self._send_raw(payload, kind, _ACK)
        for _, data, at, length in self._answers():
            yield data, at, length

    def _send_raw(self, payload: bytes, kind: int, flags: int) -> None:
        self._sequence += 1
        length = _header.size + len(payload)
        self._socket.send(_header.pack(length, kind, flags | _REQUEST, self._sequence, 0) + payload)

    def _answers(self) -> Iterator[tuple[int, bytes, int, int]]:
        """(type, buffer, offset of the message, its length) until the end of the answer."""
        while True:
            data = self._socket.recv(1 << 18)
            at = 0
            while at + 16 <= len(data):
                length, kind, flags, sequence, _ = _header.unpack_from(data, at)
                if sequence == self._sequence:
                    self._interrupted |= bool(flags & _INTERRUPTED)
                    if kind == _DONE:
                        return
                    if kind == _ERROR:
                        number = -_s32.unpack_from(data, at + 16)[0]
                        if number:
                            raise OSError(number, os.strerror(number))
                        return
                    yield kind, data, at, length
                at += -(-max(length, 16) // 4) * 4

    def dump(self, message: Any, kind: int) -> Iterator[tuple[bytes, int, int]]:
        """(buffer, offset, length) of each message of a dump. Raises OSError."""
        self._send(message, kind, _DUMP)
        for _, data, at, length in self._answers():
            yield data, at, length

    def do(self, message: Any, kind: int, flags: int = 0) -> None:
        """One change, confirmed by the kernel. Raises OSError."""
        self._send(message, kind, flags | _ACK)
        for _ in self._answers():
            pass


def attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, first byte, end) of each netlink attribute."""
    while at + 4 <= end:
        length, kind = _attribute.unpack_from(data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, at + 4, at + length
        at += -(-length // 4) * 4


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return _attribute.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(data: bytes) -> dict[int, bytes]:
    """The attributes in one that holds others."""
    return {kind: data[start:end] for kind, start, end in attributes(data, 0, len(data))}


def number(raw: bytes) -> int:
    """An unsigned integer in the machine's byte order; 0 for none."""
    return int.from_bytes(raw, sys.byteorder)


def whole(raw: bytes) -> Address:
    """16 bytes of an address of 4 or 16."""
    return raw if len(raw) == 16 else V4_PREFIX + raw


class Monitor:
    """Says that something changed, not what: of these groups (RTMGRP_…) of rtnetlink."""

    def __init__(self, groups: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, groups))
        self._socket.setblocking(False)
        self._poll = select.poll()  # select(2) takes no descriptor from 1024 on
        self._poll.register(self._socket, select.POLLIN)

    def fileno(self) -> int:
        return self._socket.fileno()

    def changed(self, seconds: float) -> bool:
        """Whether anything was told, at once or within so many seconds; takes all of it."""
        if not self._poll.poll(seconds * 1000):
            return False
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more than there was room for: changed as well
                    raise

    def close(self) -> None:
        self._socket.close()
