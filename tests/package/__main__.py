"""Installs, upgrades, downgrades, removes and purges the Debian package in a QEMU machine with
systemd, under load: `node.sh` is what is done there.

    python -m tests.package [DEB]     # by default one is built

Needs mmdebstrap, mke2fs, qemu-system-x86_64 and debhelper. The machine's disk is kept in
$XDG_CACHE_HOME/pointsman-vm/package and made again when what goes into it changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TREE = HERE.parents[1]
# What the package depends on, and a system around it: the package itself comes later, offline.
PACKAGES = (
    "systemd-sysv,udev,dbus,linux-image-cloud-amd64,initramfs-tools,iproute2,procps,kmod,"
    "python3,python3-bpfcc,python3-systemd,libbpf1,libatomic1,linux-libc-dev,init-system-helpers"
)
JOB = """[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c '/srv/node.sh; echo EXIT $?'
ExecStopPost=/bin/systemctl poweroff --force --force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TimeoutStartSec=infinity
[Install]
WantedBy=default.target
"""
_SECONDS = 1500.0


def run(*command: object, **more: object) -> None:
    subprocess.run([*map(str, command)], check=True, **more)  # type: ignore[call-overload]


def base() -> Path:
    """A directory with root/, kernel and initrd of a system without the package."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointsman-vm"
    place = cache / f"package-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:12]}"
    if not place.is_dir():
        making = Path(tempfile.mkdtemp(dir=cache_directory(cache)))
        sources = "\n".join(sorted(set(apt_sources())))
        (making / "sources.list").write_text(sources)
        run(
            "mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm",
            making / "root.tar", making / "sources.list",
        )  # fmt: skip
        making.rename(place)
    return place


def cache_directory(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def apt_sources() -> list[str]:
    """This machine's own, as one-line entries."""
    form = "deb $(SITE) $(RELEASE) $(COMPONENT)"
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in told.stdout.splitlines() if "bookworm" in line]


def build() -> Path:
    found = subprocess.run([TREE / "scripts/deb"], capture_output=True, text=True, check=True)
    return TREE / found.stdout.strip()


def newer(package: Path, to: Path, work: Path) -> None:
    """The same with +1 behind its version."""
    run("dpkg-deb", "-R", package, work / "newer")
    control = work / "newer/DEBIAN/control"
    lines = control.read_text().splitlines()
    control.write_text(
        "".join(f"{each}+1\n" if each.startswith("Version: ") else f"{each}\n" for each in lines)
    )
    run("dpkg-deb", "-Zgzip", "-z1", "-b", work / "newer", to, stdout=subprocess.DEVNULL)
    shutil.rmtree(work / "newer")


def disk(package: Path, work: Path) -> tuple[Path, Path, Path]:
    """(disk, kernel, initrd) of a machine that runs node.sh when it has started."""
    root = work / "root"
    root.mkdir()
    run("tar", "-xf", base() / "root.tar", "-C", root)
    shutil.copy(package, root / "srv/1.deb")
    newer(package, root / "srv/2.deb", work)
    for name in ("node.sh", "load.py"):
        shutil.copy(HERE / name, root / "srv" / name)
    (root / "srv/node.sh").chmod(0o755)
    (root / "etc/systemd/system/job.service").write_text(JOB)
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "job.service").symlink_to("/etc/systemd/system/job.service")
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw 0 0\n")
    (root / "etc/hostname").write_text("node\n")
    [kernel] = (root / "boot").glob("vmlinuz-*")
    [initrd] = (root / "boot").glob("initrd.img-*")
    for path in (kernel, initrd):
        shutil.copy(path, work / path.name)
    image = work / "disk.img"
    run("mke2fs", "-q", "-t", "ext4", "-d", root, image, "3G")
    shutil.rmtree(root)
    return image, work / kernel.name, work / initrd.name


def boot(image: Path, kernel: Path, initrd: Path, log: Path) -> int | None:
    """What node.sh ended with, None if the machine never said."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
        "-m", "2G", "-nographic", "-no-reboot", "-nic", "none", "-kernel", kernel,
        "-initrd", initrd, "-drive", f"file={image},if=virtio,format=raw",
        "-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=0 "
        "systemd.mask=serial-getty@ttyS0.service",
    ]  # fmt: skip
    with log.open("wb") as out:
        machine = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=out)
        try:
            machine.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            machine.kill()
            machine.wait()
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("EXIT "):
            return int(line.split()[1])
    return None


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        image, kernel, initrd = disk(Path(sys.argv[1]) if sys.argv[1:] else build(), Path(work))
        log = TREE / "dist/package-test.log"
        code = boot(image, kernel, initrd, log)
    shown = log.read_text(errors="replace").replace("\r", "").splitlines()
    print("\n".join(line for line in shown if line.startswith(("== ", "FAILED", "failed "))))
    print(f"package: exit code {code}, {time.monotonic() - began:.0f} s, log in {log}")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
