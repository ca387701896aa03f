"""This machine: cgroup2, bpffs, ports that are nobody's."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
from pathlib import Path

from pointsman import errors, portranges
from pointsman.portranges import Ranges

_HOST_CGROUP_NAMESPACE = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO, include/linux/proc_ns.h
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


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


# include/uapi/linux/capability.h
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}


def cgroup_warning(cgroup: Path) -> str:
    """What to know when `cgroup` is the root of a container's cgroup tree, "" otherwise."""
    if Path("/proc/self/ns/cgroup").stat().st_ino == _HOST_CGROUP_NAMESPACE:
        return ""
    # The one cgroup without this file is the root of them all: the host's tree is mounted there.
    top = next((p for p in (cgroup, *cgroup.parents) if p.is_mount()), cgroup)
    if not (top / "cgroup.events").exists():
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
        place = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.NoBpffs(f"{error}; this kernel has no {point}") from None
    try:
        # Of two that start at once the second would hide what the first has pinned by then.
        fcntl.flock(place, fcntl.LOCK_EX)
        if point in mounts("bpf"):
            return False
        if libc.mount(b"bpf", bytes(point), b"bpf", 0, None):
            number = ctypes.get_errno()
            kind = errors.NotRoot if number == 1 else errors.NoBpffs
            raise kind(f"mounting bpffs at {point}: {os.strerror(number)}; run as root on the host")
    finally:
        os.close(place)
    return True


def require_root() -> None:
    """Raises NotRoot without CAP_SYS_ADMIN, which it takes to read the layout of pinned maps
    (BPF_BTF_GET_FD_BY_ID) and to enter network namespaces."""
    if os.geteuid() != 0:
        raise errors.NotRoot("this needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN); use sudo")
    if not has("CAP_SYS_ADMIN"):
        raise errors.NotRoot(
            "this process lacks CAP_SYS_ADMIN; a container needs it in "
            "securityContext.capabilities.add"
        )


def has(capability: str) -> bool:
    """Whether this process has it in effect (capabilities(7))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAPABILITIES[capability] & 1)
    return True


def allow_files() -> None:
    """As many open files as we may have. 1024, what systemd gives at first, is meant for who calls
    select(2); health checks of a few hundred Services use that up."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def give_back_memory() -> None:
    """To the kernel, what this process freed. glibc keeps it otherwise (malloc_trim(3)); other C
    libraries need not be asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(ctypes.c_size_t(0))


def reserve_ports(first: int, last: int, setting: Path = _RESERVED) -> Ranges:
    """Keeps the kernel from giving these ports to sockets that ask for any port. Returns what was
    not reserved before: keep it, `release_ports` takes back no more than that.

    What is reserved already, whether by the operator or by an agent before, stays whose it was.
    The setting is that of this network namespace.
    """
    present = portranges.parse(setting.read_text())
    added = portranges.without(((first, last),), present)
    if added:
        _write_ports(setting, portranges.union(present, added))
    return added


def hold_ports(wanted: Ranges, mine: Ranges, setting: Path = _RESERVED) -> Ranges:
    """Reserves `wanted`, and gives back what of `mine`, reserved by an agent before, is in it no
    more. Returns what is ours now."""
    gone = portranges.without(mine, wanted)
    if gone:
        release_ports(gone, setting)
    added: Ranges = ()
    for first, last in wanted:
        added = portranges.union(added, reserve_ports(first, last, setting))
    return portranges.union(portranges.without(mine, gone), added)


def release_ports(ranges: Ranges, setting: Path = _RESERVED) -> bool:
    """Takes these ranges out of the reserved ports; whether that changed anything."""
    present = portranges.parse(setting.read_text())
    left = portranges.without(present, ranges)
    if left == present:
        return False
    _write_ports(setting, left)
    return True


def _write_ports(setting: Path, ranges: Ranges) -> None:
    text = portranges.to_text(ranges) + "\n"
    if len(text) >= mmap.PAGESIZE:  # the kernel would take the part that fits for the whole
        raise OSError(errno.E2BIG, f"{setting}: the list of reserved ports is too long")
    # One write: the kernel replaces the list by what one call brings.
    setting.write_text(text)
