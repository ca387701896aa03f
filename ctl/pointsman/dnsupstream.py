"""Asking the resolvers that this host uses for the names that are not Services'."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
from pathlib import Path

from dns.exception import DNSException
from dns.name import from_wire

from pointsman.dnswire import HEADER, Query

Address = tuple[str, int]


def upstreams_from_resolv_conf(path: str = "/etc/resolv.conf") -> list[Address]:
    """The name servers of resolv.conf(5), port 53. No file: none. Raises OSError otherwise."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    servers = []
    for words in map(str.split, lines):
        if len(words) > 1 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                servers.append((str(ipaddress.ip_address(words[1])), 53))
    return servers


class ResolvConf:
    """The name servers of resolv.conf(5) as it says now: a node's network may come up after its
    agent, and get other resolvers at any time. One that is gone or says none, as while it is being
    written, leaves the last ones. For one thread."""

    def __init__(self, path: str = "/etc/resolv.conf") -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._servers: list[Address] = []

    def __call__(self) -> list[Address]:
        """The same list until it says others."""
        with contextlib.suppress(OSError):
            status = Path(self._path).stat()
            now = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            if now != self._seen:
                self._servers = upstreams_from_resolv_conf(self._path) or self._servers
                self._seen = now
        return self._servers


async def ask_tcp(upstream: Address, query: Query) -> bytes:
    """The reply by a connection of its own. Raises OSError or EOFError."""
    message = secrets.token_bytes(2) + query.wire[2:]
    reader, writer = await asyncio.open_connection(*upstream)
    try:
        writer.write(len(message).to_bytes(2, "big") + message)
        size = int.from_bytes(await reader.readexactly(2), "big")
        reply = await reader.readexactly(size)
    finally:
        writer.close()
    if not _is_reply(reply, message, query):
        raise ConnectionError("not the reply to our question")
    return reply


async def ask_udp(upstream: Address, query: Query) -> bytes:
    """A fresh port and ID for each question, against forged replies (RFC 5452).

    Raises OSError, and waits without end for a reply that does not come.
    """
    message = secrets.token_bytes(2) + query.wire[2:]
    loop = asyncio.get_running_loop()
    family, _, _, _, address = socket.getaddrinfo(*upstream, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(address)  # the kernel then takes datagrams from there only
        await loop.sock_sendall(sock, message)
        while True:
            reply = await loop.sock_recv(sock, 65535)
            if _is_reply(reply, message, query):
                return reply


def _is_reply(reply: bytes, message: bytes, query: Query) -> bool:
    if len(reply) < HEADER.size or reply[:2] != message[:2] or not reply[2] & 0x80:
        return False
    questions = int.from_bytes(reply[4:6], "big")
    if not questions:
        return bool(reply[3] & 15)  # some leave it out when they fail
    try:
        name, size = from_wire(reply, HEADER.size)
    except DNSException:
        return False
    end = HEADER.size + size + 4
    return (
        questions == 1
        and name == query.name
        and reply[end - 4 : end] == message[query.end - 4 : query.end]
    )
