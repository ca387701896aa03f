"""Network namespaces in this process, each entered by one thread: a client as a pod is one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.support.kernel import needs_linux, own_network

_SO_NETNS_COOKIE, _SO_COOKIE = 71, 57  # include/uapi/asm-generic/socket.h
_T = TypeVar("_T")


def netns_cookie() -> int:
    """Of the calling thread's network namespace."""
    needs_linux(5, 14, "SO_NETNS_COOKIE")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")


def cookie_of(client: socket.socket) -> int:
    return int.from_bytes(client.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little")


class Pod:
    """A network namespace of its own with the same local addresses as the test's, and no way out.

    The namespace ends with the thread in it and with the sockets made there.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.run(own_network)

    @property
    def netns(self) -> int:
        """Its cookie."""
        return self.run(netns_cookie)

    def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Calls it inside the namespace."""
        return self._thread.submit(work, *arguments).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _at: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
