"""This machine: cgroup2, bpffs, addresses. The only module that imports pyroute2."""

from __future__ import annotations

import ctypes
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path

from pointsman import errors
from pointsman.values import Address, to_address

_HOST_CGROUP_NAMESPACE = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO, include/linux/proc_ns.h
_LOOPBACK = (to_address("127.0.0.1"), to_address("::1"))


def mounts(file_system: str, table: Path = Path("/proc/self/mounts")) -> list[Path]:
    """Where file systems of this type are mounted, in the order of the mount table."""
    found = []
    for line in table.read_text().splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] == file_system:
            found.append(Path(fields[1].encode().decode("unicode_escape")))
    return found


def cgroup_root(table: Path = Path("/proc/self/mounts")) -> Path:
    """The cgroup2 mount: /sys/fs/cgroup on unified hosts, …/unified on hybrid ones."""
    found = mounts("cgroup2", table)
    for preferred in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if preferred in found:
            return preferred
    if found:
        return found[0]
    raise errors.NoCgroup2(
        "no cgroup2 file system is mounted; run 'mount -t cgroup2 none /sys/fs/cgroup/unified', "
        "or boot with systemd.unified_cgroup_hierarchy=1"
    )


def check_cgroup(path: Path, table: Path = Path("/proc/self/mounts")) -> None:
    """Refuses what is no cgroup2 directory: links can't attach anywhere else."""
    if not (path / "cgroup.procs").exists() or not (path / "cgroup.controllers").exists():
        where = ", ".join(map(str, mounts("cgroup2", table))) or "nowhere"
        raise errors.NoCgroup2(
            f"{path} is not a cgroup2 directory (cgroup2 is mounted at {where}); "
            "choose one with --cgroup"
        )


def cgroup_warning() -> str:
    """What to know when this process sees a container's cgroup tree, "" otherwise."""
    if Path("/proc/self/ns/cgroup").stat().st_ino == _HOST_CGROUP_NAMESPACE:
        return ""
    return (
        "this process is in a cgroup namespace: the root it sees may not be the host's, and "
        "sockets made outside of it are never translated; mount the host's /sys/fs/cgroup"
    )


def mount_bpffs(root: Path) -> bool:
    """Mounts bpffs where `root` should live, if it is not mounted yet; whether it did."""
    for point in mounts("bpf"):
        if root.is_relative_to(point):
            return False
    point = Path("/sys/fs/bpf")
    if not root.is_relative_to(point):
        raise errors.NoBpffs(
            f"{root} is not on a bpffs; mount one there, or choose a directory below {point}"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        point.mkdir(exist_ok=True)
    except OSError as error:
        raise errors.NoBpffs(f"{error}; this kernel has no {point}") from None
    if libc.mount(b"bpf", bytes(point), b"bpf", 0, None):
        number = ctypes.get_errno()
        kind = errors.NotRoot if number == 1 else errors.NoBpffs
        raise kind(f"mounting bpffs at {point}: {os.strerror(number)}; run as root on the host")
    return True


def require_root() -> None:
    """CAP_NET_ADMIN and CAP_BPF are what it takes; a missing one is named by the kernel later."""
    if os.geteuid() != 0:
        raise errors.NotRoot("this needs root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON); use sudo")


def local_addresses() -> frozenset[Address]:
    """The addresses assigned to devices of this network namespace, loopback's own left out."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        found = {
            message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            for message in route.get_addr()
        }
    return frozenset(to_address(text) for text in found if text) - frozenset(_LOOPBACK)


def watch_addresses(changed: Callable[[frozenset[Address]], None], stop: threading.Event) -> None:
    """Calls `changed` with all addresses, once at start and whenever one comes or goes."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR

    with IPRoute() as route:
        # Listening starts before the first reading: nothing can slip in between.
        route.bind(groups=RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
        known = local_addresses()
        changed(known)
        while not stop.is_set():
            ready, _, _ = select.select([route], [], [], 0.5)
            if not ready:
                continue
            for _message in route.get():
                pass
            now = local_addresses()
            if now != known:
                known = now
                changed(now)
