"""A Debian 12 box for Vagrant and libvirt, for machines that reach no public one.

    python -m tests.vm.box FILE.box     # makes it; needs root, and no loop device
    python -m tests.vm.box --key        # prints what is another when the box would be another

It has what `scripts/setup --dev` installs, .venv too, so that its machines need no network: neither
for Pointsman's Debian package nor for the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

from tests.vm import image, packages

#: The first two lines are any box's.
_INCLUDE = (
    *("systemd-sysv", "dbus", "udev", "linux-image-cloud-amd64", "grub-pc-bin", "openssh-server"),
    *("sudo", "rsync", "ifupdown", "isc-dhcp-client", "iputils-ping", "kmod", "less"),
    *("libcap2-bin", "procps"),
)
_GIB = 10
_SECTOR = 512
_FIRST = 2048  # the partition's sector
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 debian-12\n::1 localhost ip6-localhost ip6-loopback\n"
_INTERFACES = """source /etc/network/interfaces.d/*

auto lo
iface lo inet loopback

auto eth0
iface eth0 inet dhcp
"""
_GRUB = """search --no-floppy --label --set=root root
linux /vmlinuz root=LABEL=root ro net.ifnames=0 console=tty0 console=ttyS0
initrd /initrd.img
boot
"""


def main() -> int:
    match sys.argv[1:]:
        case ["--key"]:
            print(image.key(Path(__file__).read_bytes()))
        case [name]:
            packages.need("mke2fs", "mmdebstrap", "qemu-img")
            make(Path(name).absolute())
        case _:
            raise packages.CannotRun("name the file to write, or say --key")
    return 0


def make(box: Path) -> None:
    # Asked to end, it ends what it started, too, and tidies up.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if os.geteuid():
        raise packages.CannotRun("run this as root: it makes a root file system")
    public = _known_key()
    with tempfile.TemporaryDirectory(prefix="box.", dir=box.parent) as made:
        work = Path(made)
        tree = image.debian(work, _INCLUDE)
        _settle(tree, public)
        disk = _disk(tree, work)
        packages.run("qemu-img", "convert", "-O", "qcow2", disk, work / "box.img")
        about = {"provider": "libvirt", "format": "qcow2", "virtual_size": _GIB}
        (work / "metadata.json").write_text(json.dumps(about))
        (work / "Vagrantfile").write_text('Vagrant.configure("2") {}\n')
        files = ("metadata.json", "Vagrantfile", "box.img")
        packages.run("tar", "-C", work, "-cf", work / "new.box", *files)
        (work / "new.box").rename(box)


def _known_key() -> str:
    """The key that everybody knows, as Vagrant ships it: `vagrant up` puts another in its place."""
    for place in ("/usr/share", "/opt/vagrant"):
        for found in Path(place).rglob("keys/vagrant.pub"):
            return found.read_text()
    raise packages.CannotRun("missing: vagrant, which has the file keys/vagrant.pub")


def _settle(tree: Path, public: str) -> None:
    """The user that Vagrant logs in as, and what a machine of its own has."""
    packages.run("chroot", tree, "useradd", "--create-home", "--shell", "/bin/bash", "vagrant")
    (tree / "home/vagrant/.ssh").mkdir(mode=0o700)
    (tree / "home/vagrant/.ssh/authorized_keys").write_text(public)
    (tree / "home/vagrant/.ssh/authorized_keys").chmod(0o600)
    packages.run("chroot", tree, "chown", "-R", "vagrant:vagrant", "/home/vagrant")
    for name, text in (
        ("sudoers.d/vagrant", "vagrant ALL=(ALL) NOPASSWD: ALL\n"),
        ("ssh/sshd_config.d/vagrant.conf", "UseDNS no\n"),
        ("fstab", "LABEL=root / ext4 defaults 0 1\n"),
        ("hostname", "debian-12\n"),
        ("hosts", _HOSTS),
        ("network/interfaces", _INTERFACES),
        ("machine-id", ""),  # each VM makes its own
    ):
        (tree / "etc" / name).write_text(text)
    (tree / "etc/resolv.conf").unlink(missing_ok=True)  # this machine's; DHCP writes the VM's


def _disk(tree: Path, work: Path) -> Path:
    """A disk that starts by GRUB. grub-install wants a device to look at. All that it would find
    out is known here: boot.img is the first sector, core.img follows it, as is the default."""
    (tree / "boot/grub").mkdir(parents=True, exist_ok=True)
    (tree / "boot/grub/grub.cfg").write_text(_GRUB)
    packages.run(
        *("chroot", tree, "grub-mkimage", "--format=i386-pc", "--output=/core.img"),
        *("--prefix=(hd0,msdos1)/boot/grub", "biosdisk", "part_msdos", "ext2"),
        *("search", "search_label", "linux", "normal", "boot"),
    )
    core = (tree / "core.img").read_bytes()
    (tree / "core.img").unlink()
    if len(core) >= (_FIRST - 1) * _SECTOR:
        raise packages.CannotRun(f"GRUB has {len(core)} bytes: too much before the partition")
    start = (tree / "usr/lib/grub/i386-pc/boot.img").read_bytes()[:440]
    disk = work / "disk"
    with disk.open("wb") as raw:
        raw.truncate(_GIB << 30)
    image.mke2fs(
        *("-t", "ext4", "-L", "root", "-d", tree, disk, f"{(_GIB << 10) - 8}M"),
        *("-E", f"offset={_FIRST * _SECTOR},root_owner=0:0"),
    )
    shutil.rmtree(tree)
    count = (_GIB << 30) // _SECTOR - _FIRST
    entry = struct.pack("<B3sB3sII", 0x80, b"\xff" * 3, 0x83, b"\xff" * 3, _FIRST, count)
    with disk.open("r+b") as raw:
        raw.write(start)
        raw.seek(446)
        raw.write(entry + bytes(48) + b"\x55\xaa" + core)
    return disk


if __name__ == "__main__":
    try:
        sys.exit(main())
    except packages.CannotRun as error:
        sys.exit(f"box: {error}")
