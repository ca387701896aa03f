"""The sockets that the DNS server listens on."""

from __future__ import annotations

import errno
import ipaddress
import itertools
import socket

_MENDS = {
    errno.EADDRINUSE: "another server has it (ss -lntup names it): stop that or listen elsewhere",
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "no device of this host has the address: add it or listen elsewhere",
}


class DnsListenError(OSError):
    """An address can't be listened on; the text names it and the mend, `errno` is the kernel's."""


def bind(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A UDP and a TCP socket on the same address and port. Raises DnsListenError."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise DnsListenError(errno.EINVAL, f"dns: {host!r} is no IP address") from error
    if address.is_unspecified:
        text = f"dns: can't listen on {host}: replies might leave from another address; list them"
        raise DnsListenError(errno.EINVAL, text)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for attempt in itertools.count():
        socks: list[socket.socket] = []
        try:
            chosen = port
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
                socks.append(sock)
                if kind == socket.SOCK_STREAM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(socket.getaddrinfo(host, chosen, type=kind)[0][4])
                chosen = sock.getsockname()[1]
            return socks[0], socks[1]
        except OSError as error:
            for sock in socks:
                sock.close()
            if port == 0 and error.errno == errno.EADDRINUSE and attempt < 8:
                continue  # the port that UDP was given is taken in TCP
            mend = _MENDS.get(error.errno or 0, "choose another address")
            text = f"dns: can't listen on {host} port {port}: {error.strerror}; {mend}"
            raise DnsListenError(error.errno or errno.EINVAL, text) from error
    raise AssertionError("unreachable")
