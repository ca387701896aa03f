"""The network namespaces of this machine, entered only by threads that end there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pointsman import netlink
from pointsman.netlink import devices
from pointsman.stale import Record
from pointsman.values import Address

_SO_NETNS_COOKIE = 71  # Linux 5.14
_CLONE_NEWNET = 0x40000000
_OWN = Path("/proc/thread-self/ns/net")
_libc = ctypes.CDLL(None, use_errno=True)
_INODE = re.compile(r"net:\[(\d+)\]")


def cookie() -> int:
    """What the kernel calls the calling thread's network namespace; never used again. Raises
    OSError (ENOPROTOOPT) before Linux 5.14."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            found = one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                why = "network namespaces tell their cookies from Linux 5.14 on"
                raise OSError(error.errno, why) from None
            raise
        return int(struct.unpack("=Q", found)[0])


def inode() -> int:
    """The calling thread's network namespace by its inode in nsfs."""
    return _OWN.stat().st_ino


def namespaces() -> Iterator[tuple[int, int]]:
    """(inode, file descriptor) of every network namespace, the calling thread's first. A
    descriptor is closed when the next one is asked for.

    Found are those of processes, and those that a file keeps: /run/netns/NAME, or cni-… of a
    container runtime, also where only the host's first process sees the mount.
    """
    seen: set[int] = set()
    for number, path in _places():
        if number in seen:
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # ended or unmounted; another place may lead to the same namespace
        try:
            # A process may have changed its namespace since, a mount may hide another.
            number = os.fstat(fd).st_ino
            if number not in seen:
                seen.add(number)
                yield number, fd
        finally:
            os.close(fd)


def _places() -> Iterator[tuple[int, Path]]:
    yield inode(), _OWN
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            path = directory / "ns/net"
            with contextlib.suppress(OSError):
                if match := _INODE.fullmatch(str(path.readlink())):
                    yield int(match[1]), path
    yield from mounted(Path("/proc/self/mountinfo"), Path("/"))
    # In a container: what the host has, if its processes are seen (hostPID).
    yield from mounted(Path("/proc/1/mountinfo"), Path("/proc/1/root"))


def mounted(table: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """(inode, path) of the network namespaces that are mounted on files (proc(5), mountinfo)."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(" ")
        match = _INODE.fullmatch(fields[3])
        if match:
            point = fields[4].encode().decode("unicode_escape")
            yield int(match[1]), root / point.lstrip("/")


def visit(work: Callable[[], bool], *, others_only: bool = False) -> list[OSError]:
    """Calls `work` in one namespace after the other, the caller's own first, until it returns
    True. Returns why namespaces were passed over; what `work` raises comes out. Raises OSError,
    too, where there is no thread or descriptor to be had.

    It runs on a thread that ends with the last one: coming back could fail, and would leave the
    thread in a foreign namespace. Sockets stay in the namespace in which they were made.
    """
    passed: list[OSError] = []
    failed: list[BaseException] = []
    own = inode()

    def run() -> None:
        try:
            for number, fd in namespaces():
                if number == own and others_only:
                    continue
                if number != own and _libc.setns(fd, _CLONE_NEWNET):
                    error = ctypes.get_errno()
                    passed.append(OSError(error, f"netns {number}: {os.strerror(error)}"))
                elif work():
                    return
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="netns", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # Python's word for EAGAIN: no more processes, or memory
        raise OSError(errno.EAGAIN, f"network namespaces can't be entered: {error}") from None
    thread.join()
    if failed:
        raise failed[0]
    return passed


class Ended(NamedTuple):
    """Which sockets were ended; what the kernel refused; which namespaces were passed over."""

    records: list[Record]
    refused: OSError | None
    passed: list[OSError]


def destroy(records: Iterable[Record], still: Callable[[Record], bool]) -> Ended:
    """Ends the sockets of these records wherever they are, as `netlink.destroy` does. Raises
    nothing: what hinders it may pass, and nobody should end for that."""
    left = set(records)
    ended: list[Record] = []
    refused: list[OSError] = []

    def here() -> bool:
        try:
            found = netlink.destroy(left, still)
        except OSError as error:
            refused[:] = [error]
            return error.errno == errno.EOPNOTSUPP
        ended.extend(found)
        left.difference_update(found)
        return not left

    passed: list[OSError] = []
    try:
        passed = visit(here) if left else []
    except OSError as error:
        refused[:] = [error]
    return Ended(ended, refused[0] if refused else None, passed)


class Inside(NamedTuple):
    """Where an address is: the cookie of its namespace, and the caller's device that leads there
    (ifindex), 0 if none does directly."""

    cookie: int
    device: int = 0


def found_in(addresses: frozenset[Address]) -> dict[Address, Inside]:
    """The namespaces in which a device has one of these addresses; the caller's own does not count,
    and neither does an address that two namespaces have."""
    found: dict[Address, set[int]] = {}
    ends: dict[Address, tuple[int, int]] = {}

    def look() -> bool:
        for address in netlink.addresses() & addresses:
            found.setdefault(address, set()).add(cookie())
        if here := addresses & found.keys() - ends.keys():
            ends.update(devices.peers_of(here))
        return False

    if addresses:
        visit(look, others_only=True)
    alone = {address: min(cookies) for address, cookies in found.items() if len(cookies) == 1}
    # An ifindex means nothing in another namespace: both ends have to name each other.
    ours = devices.ends() if ends else {}
    return {
        address: Inside(one, _other_end(ends.get(address), ours)) for address, one in alone.items()
    }


def _other_end(end: tuple[int, int] | None, ours: dict[int, int]) -> int:
    return end[1] if end and ours.get(end[1]) == end[0] else 0


def netns_of(addresses: frozenset[Address]) -> dict[Address, int]:
    """The cookies of the namespaces that `found_in` tells."""
    return {address: inside.cookie for address, inside in found_in(addresses).items()}
