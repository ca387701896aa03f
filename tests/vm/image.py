"""What a machine boots from: one root for all kernels, and each kernel's modules.

    <cache>/root-<key>/root.img, busybox      Debian with all that `scripts/setup --dev` installs
    <cache>/node-<key>/root.img, busybox      Debian with systemd, where a package may be installed
    <cache>/kernel-<release>/vmlinuz, modules.img, initrd

Everything is read-only to the machines, so any number may run from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import lzma
import os
import platform
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm import packages

TREE = Path(__file__).parents[2]
#: Where the tree is inside; .venv is made there with the root and refers to it.
INSIDE = "/srv/pointsman"
_HERE = Path(__file__).parent
#: What it takes to mount the root; crc32c is asked for by ext4 by name only.
_EARLY = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "overlay")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One to boot, by the name that a person gives it."""

    name: str
    release: str
    image: Path
    modules: Path
    initrd: Path


def root() -> Path:
    """The directory of root.img and busybox; made (some minutes) if it is not there."""
    where = packages.cache() / f"root-{key(_how(_make_root, _file_system))}"
    _once(where, _make_root)
    return where


def key(more: bytes) -> str:
    """Another one when `debian` would make another tree, or what is done with it is another."""
    digest = hashlib.sha256(_release().encode())
    # scripts/setup makes a .venv anew for any other pyproject.toml.
    for path in (TREE / "pyproject.toml", TREE / "scripts" / "setup"):
        digest.update(path.read_bytes())
    digest.update(_how(debian, _download) + more)
    return digest.hexdigest()[:12]


def _release() -> str:
    """This machine's own: its pip's wheels and its bcc's programs fit there."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def _download(wheels: Path, extra: str, *more: str) -> None:
    """What pip installs of the project, with these extras or "", and more."""
    found = tomllib.loads((TREE / "pyproject.toml").read_text())
    wanted = [*found["project"]["dependencies"], *found["build-system"]["requires"], *more]
    if extra:
        wanted += found["project"]["optional-dependencies"][extra]
    packages.run(
        *(TREE / ".venv/bin/python", "-m", "pip", "download", "-q", "--only-binary=:all:"),
        *("-d", wheels, *wanted),
    )


def debian(fresh: Path, include: Iterable[str]) -> Path:
    """The tree of a Debian with these packages and all that `scripts/setup --dev` installs, in
    `fresh`. INSIDE is there, with nothing that is used but its .venv."""
    wheels = fresh / "wheels"
    # hatchling asks for editables when it makes an editable install.
    _download(wheels, "dev", "pip", "editables")
    # What pip makes of the project is a link to INSIDE: these files are enough for it.
    part = fresh / "tree"
    for name in ("pyproject.toml", "README.md", "scripts/setup", "ctl/pointsman/__init__.py"):
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / name, part / name)
    (part / "bpf").mkdir()
    place = f'"$1"{INSIDE}'
    inside = f"cd {INSIDE} && PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels scripts/setup --dev"
    tree = fresh / "root"
    packages.run(
        # What it mounts is gone with it, however it ends.
        *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
        *("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(include)}"),
        *(f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale")),
        f"--customize-hook=mkdir -p {place} && cp -r {shlex.quote(str(part))}/. {place}",
        f'--customize-hook=cp -r {shlex.quote(str(wheels))} "$1"/wheels',
        '--customize-hook=apt-config dump Acquire >"$1"/etc/apt/apt.conf.d/vm',
        f'--customize-hook=chroot "$1" sh -c {shlex.quote(inside)}',
        '--customize-hook=rm -r "$1"/wheels "$1"/etc/apt/apt.conf.d/vm',
        *(_release(), tree, f"deb {packages.archive()} {_release()} main"),
    )
    for each in (part, wheels):
        shutil.rmtree(each)
    return tree


def _make_root(fresh: Path) -> None:
    print("vm: making the root of the machines, some minutes", flush=True)
    tree = debian(fresh, ["busybox-static"])
    shutil.copy(tree / "bin/busybox", fresh / "busybox")
    _file_system(tree, fresh / "root.img", 3 << 30)
    shutil.rmtree(tree)


#: A node before Pointsman comes: systemd, and what the Debian package and `make install` need.
_NODE = (
    *("systemd-sysv", "udev", "dbus", "kmod", "procps", "iproute2", "busybox-static", "make"),
    *("python3", "python3-bpfcc", "python3-systemd", "python3-venv", "libbpf1", "libatomic1"),
    *("linux-libc-dev", "bash-completion", "bpftool"),
)
# systemd starts what runs in the other machines as their first process.
_JOB = f"""[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh {INSIDE}/tests/vm/guest
TimeoutStartSec=infinity
[Install]
WantedBy=default.target
"""


def node() -> Path:
    """As `root`, for a machine that is a node; Python's wheels are in /wheels."""
    project = (TREE / "pyproject.toml").read_bytes()
    digest = hashlib.sha256(repr((_NODE, _JOB, project, _release())).encode())
    digest.update(_how(_make_node, _download, _file_system))
    where = packages.cache() / f"node-{digest.hexdigest()[:12]}"
    _once(where, _make_node)
    return where


def _make_node(fresh: Path) -> None:
    print("vm: making the root of a node, some minutes", flush=True)
    wheels, job, tree = fresh / "wheels", fresh / "job.service", fresh / "root"
    _download(wheels, "")
    job.write_text(_JOB)
    packages.run(
        *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
        *("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(_NODE)}"),
        f'--customize-hook=cp -r {shlex.quote(str(wheels))} "$1"/wheels',
        f'--customize-hook=cp {shlex.quote(str(job))} "$1"/etc/systemd/system',
        '--customize-hook=chroot "$1" systemctl enable job.service',
        # It would have the terminal on which the log is written.
        '--customize-hook=chroot "$1" systemctl mask serial-getty@ttyS0.service',
        f'--customize-hook=mkdir -p "$1"{INSIDE}',
        *(_release(), tree, f"deb {packages.archive()} {_release()} main"),
    )
    shutil.copy(tree / "bin/busybox", fresh / "busybox")
    _file_system(tree, fresh / "root.img", 3 << 30)
    for each in (tree, wheels):
        shutil.rmtree(each)


def kernel(name: str, busybox: Path) -> Kernel:
    release, archives = packages.kernel(name)
    how = _how(_make_kernel, _make_initrd, _with_needs, _file_system) + repr(_EARLY).encode()
    digest = hashlib.sha256((_HERE / "init").read_bytes() + how)
    where = packages.cache() / f"kernel-{release}-{digest.hexdigest()[:8]}"
    _once(where, lambda fresh: _make_kernel(fresh, release, archives, busybox))
    return Kernel(name, release, where / "vmlinuz", where / "modules.img", where / "initrd")


def _make_kernel(fresh: Path, release: str, archives: list[Path], busybox: Path) -> None:
    tree = fresh / "tree"
    for archive in archives:
        packages.run("dpkg-deb", "-x", archive, tree)
    # It is elsewhere since /usr was merged.
    images = [*tree.rglob(f"vmlinuz-{release}"), *tree.rglob("vmlinuz")]
    images[0].rename(fresh / "vmlinuz")
    [modules] = [found for found in tree.rglob(f"lib/modules/{release}") if found.is_dir()]
    for packed in modules.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    base = modules.parents[2]
    packages.run(busybox, "depmod", "-b", base, release)
    _make_initrd(fresh, modules, busybox)
    _file_system(modules, fresh / "modules.img", 1 << 30)
    shutil.rmtree(tree)


def _make_initrd(fresh: Path, modules: Path, busybox: Path) -> None:
    tree = fresh / "initrd.d"
    for name in ("bin", "proc", "sys", "dev", "ro", "rw", "root", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    shutil.copy(_HERE / "init", tree / "init")
    (tree / "init").chmod(0o755)
    order = list[str]()
    for name in _EARLY:
        for path in _with_needs(modules, name):
            if path.name not in order:
                shutil.copy(path, tree / "modules" / path.name)
                order.append(path.name)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
    names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*")))
    packed = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"],
        input=names.encode(), cwd=tree, capture_output=True, check=True,
    )  # fmt: skip
    (fresh / "initrd").write_bytes(packed.stdout)
    shutil.rmtree(tree)


def _with_needs(modules: Path, name: str) -> list[Path]:
    """The module's files, what it needs first; none if it is part of the kernel."""
    pattern = re.compile(rf"^(\S*/{name.replace('_', '[-_]')}\.ko):(.*)$", re.M)
    found = pattern.search((modules / "modules.dep").read_text())
    if not found:
        return []
    return [modules / path for path in [*reversed(found[2].split()), found[1]]]


def _how(*functions: Callable[..., object]) -> bytes:
    """What is made otherwise is another thing; the rest of this file may change."""
    return "".join(map(inspect.getsource, functions)).encode()


def _file_system(tree: Path, image: Path, size: int) -> None:
    """ext2: nothing of it is newer than the oldest kernel, and nobody writes to it."""
    mke2fs("-t", "ext2", "-m", "0", "-d", tree, image, f"{size >> 10}k")


def mke2fs(*arguments: str | Path) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages.run("mke2fs", "-q", *arguments, env={**os.environ, "PATH": path})


def _once(where: Path, make: Callable[[Path], None]) -> None:
    """Whole or not at all, also when two ask at once."""
    with _locked(where.with_suffix(".lock")):
        if where.is_dir():
            return
        fresh = where.with_name(f"{where.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        make(fresh)
        fresh.rename(where)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
