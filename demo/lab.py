"""Network namespaces, a child cgroup and the processes in them, all of it taken away again.

Nothing made here is connected to the machine: no default route, no link to the first namespace.
Everything carries the lab's name, and every process is in the lab's own cgroup, so that even what
a killed run left behind is found by name (`sweep`) and ended by `cgroup.kill`, never by guessing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pyroute2 import IPRoute

from pointsman import host

_REGISTRY = Path("/run/pointsman-lab")
_NETNS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_BRIDGE_MAC = "02:00:5e:00:53:01"
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BPFFS = Path("/sys/fs/bpf")

# The child moves itself, then becomes the program: no moment in which it runs elsewhere.
_ENTER = 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"'

# A mount namespace in which names are resolved by the lab's resolver and by nothing else.
_RESOLVER = """
set -e
mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)"
mount --bind "$1/nsswitch.conf" "$(readlink -f /etc/nsswitch.conf)"
if [ -d /run/nscd ]; then mount -t tmpfs none /run/nscd; fi
echo ready
exec sleep infinity
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: a network namespace, a cgroup, and maybe the files of a process."""

    network: Path
    cgroup: Path
    files: Path | None = None  # /proc/PID of a process in the mount namespace

    def wrap(self, command: Sequence[str | Path]) -> list[str]:
        """The argument list that runs `command` there. The working directory becomes /."""
        enter = ["nsenter", f"--net={self.network}"]
        if self.files:
            # Entering a mount namespace leaves a chroot, if we are in one: go back into it.
            enter += [f"--mount={self.files}/ns/mnt", f"--root={self.files}/root"]
        return ["sh", "-c", _ENTER, "sh", str(self.cgroup), *enter, "--", *map(str, command)]


class Lab:
    """A context manager. Needs root. `kind` is the first part of every name it gives."""

    def __init__(self, kind: str = "demo") -> None:
        self.name = f"pointsman-{kind}-{os.getpid()}"
        self.directory = _REGISTRY / self.name
        self.cgroup = host.cgroup_root() / self.name
        self.bpffs = _BPFFS / self.name
        self._lock = -1
        self._pid = os.getpid()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        with registry():
            _sweep()  # of runs that were killed
            self.directory.mkdir(mode=0o700)
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.cgroup.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, removes everything. May be called twice; not by a forked child."""
        if os.getpid() != self._pid:
            return
        with _undisturbed():
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()
            for process in self._processes:
                stop(process)
            remove(self.name)
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # -- places ------------------------------------------------------------------------------

    def group(self, role: str) -> Path:
        """A child cgroup of the lab's own; made at the first call."""
        path = self.cgroup / role
        path.mkdir(exist_ok=True)
        return path

    def namespace(self, role: str) -> Path:
        """A new network namespace, with loopback up. `ip netns list` shows it."""
        path = _NETNS / f"{self.name}-{role}"
        _ip_netns("add", path.name)
        with _links(path) as links:
            links.link("set", index=1, state="up")
        return path

    def bridge(self, namespace: Path, name: str, address: str) -> None:
        """A bridge with an address such as 10.244.0.1/24."""
        with _links(namespace) as links:
            # Without a MAC address of its own a bridge takes the lowest of its ports': a new pod
            # would change it, and the neighbours would send to the old one for a while.
            links.link("add", ifname=name, kind="bridge", address=_BRIDGE_MAC)
            index = links.link_lookup(ifname=name)[0]
            _address(links, index, address)
            links.link("set", index=index, state="up")

    def plug(self, namespace: Path, address: str, *, into: Path, bridge: str) -> None:
        """Gives a namespace an eth0 with this address, on a bridge in another namespace."""
        port = "to-" + namespace.name.removeprefix(f"{self.name}-")[:12]
        with _links(into) as links:
            peer = {"ifname": "eth0", "net_ns_fd": namespace.name}
            links.link("add", ifname=port, kind="veth", peer=peer)
            index = links.link_lookup(ifname=port)[0]
            master = links.link_lookup(ifname=bridge)[0]
            links.link("set", index=index, master=master, state="up")
        with _links(namespace) as links:
            index = links.link_lookup(ifname="eth0")[0]
            _address(links, index, address)
            links.link("set", index=index, state="up")

    def resolver(self, place: Place, nameserver: str, domain: str = "cluster.local") -> Place:
        """The same place with a mount namespace whose resolv.conf is that of a pod."""
        search = f"default.svc.{domain} svc.{domain} {domain}"
        etc = self.directory / "etc"
        etc.mkdir()
        (etc / "resolv.conf").write_text(
            f"nameserver {nameserver}\nsearch {search}\noptions ndots:5\n"
        )
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
        hold: list[str | Path] = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _RESOLVER,
            "sh",
            etc,
        ]
        holder = self.start(hold, place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert holder.stdout and holder.stderr
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"no mount namespace: {holder.stderr.read().strip()}")
        return Place(place.network, place.cgroup, Path(f"/proc/{holder.pid}"))

    # -- processes ---------------------------------------------------------------------------

    def start(
        self,
        command: Sequence[str | Path],
        place: Place,
        *,
        env: dict[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.DEVNULL,
        stderr: int | IO[Any] | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Starts a process that the lab ends. A Ctrl-C at the terminal does not reach it."""
        with _whole():
            process = subprocess.Popen(
                place.wrap(command),
                env=env,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
            self._processes.append(process)
        return process

    def run(
        self,
        command: Sequence[str | Path],
        place: Place,
        *,
        env: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, both outputs captured. Never raises for its exit code."""
        process = self.start(
            command, place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += f"\nstopped after {timeout:g} seconds"
        finally:
            stop(process)
        self._processes.remove(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stop(process: subprocess.Popen[str], grace: float = 3) -> None:
    """Ends a process and closes its pipes: politely, after `grace` seconds by SIGKILL."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def sweep() -> list[str]:
    """Removes what labs left behind whose process was killed; their names."""
    with registry():
        return _sweep()


def remains(name: str) -> list[Path]:
    """Everything on this machine that carries the name of a lab. Empty after `close`."""
    found = [host.cgroup_root() / name, _BPFFS / name, _REGISTRY / name]
    if _NETNS.is_dir():
        found += _NETNS.glob(f"{name}-*")
    return [path for path in found if path.exists()]


def remove(name: str) -> None:
    """Ends the processes in the lab's cgroup, then removes all that carries the lab's name."""
    cgroup = host.cgroup_root() / name
    if cgroup.is_dir():
        _end(cgroup)
    if (_BPFFS / name).is_dir():
        shutil.rmtree(_BPFFS / name)
    for path in _NETNS.glob(f"{name}-*") if _NETNS.is_dir() else ():
        _ip_netns("delete", path.name)
    shutil.rmtree(_REGISTRY / name, ignore_errors=True)


def _end(cgroup: Path, patience: float = 60) -> None:
    until = time.monotonic() + patience
    while not _emptied(cgroup):
        if time.monotonic() > until:
            raise RuntimeError(f"processes in {cgroup} do not end")
        try:
            (cgroup / "cgroup.kill").write_text("1")
        except FileNotFoundError:  # before Linux 5.14
            for group in (cgroup, *cgroup.rglob("*/")):
                for pid in (group / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)


def _emptied(cgroup: Path) -> bool:
    """Removes it, if no process is in it. One that was being started may come in at any time, if
    whoever started it was stopped there."""
    if "populated 1" in (cgroup / "cgroup.events").read_text():
        return False
    inner = sorted((path for path in cgroup.rglob("*") if path.is_dir()), reverse=True)
    try:
        for path in (*inner, cgroup):
            path.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _ip_netns(verb: str, name: str) -> None:
    """pyroute2 forks this process for it, with all its signal handlers and open `with` blocks."""
    with _whole():
        done = subprocess.run(
            ["ip", "netns", verb, name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"ip netns {verb} {name}: {done.stderr.strip()}")


@contextlib.contextmanager
def _links(namespace: Path) -> Iterator[Any]:
    """rtnetlink of a namespace. This thread, and it alone, is in there for as long."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as home, namespace.open() as there:
        _setns(libc, there.fileno())
        try:
            with IPRoute() as links:
                yield links
        finally:
            _setns(libc, home.fileno())


def _setns(libc: ctypes.CDLL, fd: int) -> None:
    if libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _address(links: Any, index: int, address: str) -> None:
    ip, _, length = address.partition("/")
    # Without nodad an IPv6 address can't be used for two seconds.
    extra = {"flags": 0x02} if ":" in ip else {}
    links.addr("add", index=index, address=ip, prefixlen=int(length), **extra)


def _sweep() -> list[str]:
    swept = []
    for directory in sorted(_REGISTRY.iterdir()):
        if not directory.is_dir():
            continue
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its lab is alive
        else:
            remove(directory.name)
            swept.append(directory.name)
        finally:
            os.close(lock)
    return swept


@contextlib.contextmanager
def registry() -> Iterator[None]:
    """One process at a time makes or sweeps labs: none is swept before it holds its lock."""
    _REGISTRY.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(_REGISTRY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """A Ctrl-C waits until this is done: in the middle it would leave a process that nobody knows
    of, which makes things while they are taken away."""
    came: list[int] = []
    try:
        before = {
            number: signal.signal(number, lambda number, _: came.append(number))
            for number in _ENDINGS
            if signal.getsignal(number) is not signal.SIG_IGN  # which those that we start inherit
        }
    except ValueError:  # not the main thread: it gets no signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up half-way."""
    try:
        before = {n: signal.signal(n, signal.SIG_IGN) for n in _ENDINGS}
    except ValueError:  # not the main thread: it gets no signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
