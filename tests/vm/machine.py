"""One machine in QEMU: booted, waited for, its exit code carried out."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import TREE, Kernel
from tests.vm.packages import need, run

_PROBE = 10.0  # seconds for a boot where KVM works; it takes one or two


@dataclass(frozen=True, slots=True)
class Result:
    """`code` is None if the machine never told one: it hung, crashed or was ended."""

    kernel: Kernel
    code: int | None
    seconds: float
    log: Path


def tree(
    to: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    more: Mapping[str, Path] | None = None,
) -> None:
    """A tar archive of this tree as it is, with what to run in it. Git says what belongs to it;
    `more` are files and directories besides, by their names in it."""
    names = run("git", "-C", TREE, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    lines = [f"date -s @{time.time():.0f} >/dev/null"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    text = "\n".join([*lines, f"set -- {shlex.join(command)}", ""]).encode()
    with tarfile.open(to, "w") as archive:
        for name in filter(None, names):
            if (TREE / name).exists():
                archive.add(TREE / name, name, recursive=False)
        for name, path in (more or {}).items():
            archive.add(path, name)
        arguments = tarfile.TarInfo(".vm/arguments")
        arguments.size = len(text)
        archive.addfile(arguments, io.BytesIO(text))


def boot(
    kernel: Kernel,
    root: Path,
    tar: Path,
    log: Path,
    *,
    accelerator: str,
    seconds: float,
    memory: int = 3072,
    cpus: int = 1,
) -> Result:
    """Runs until the machine is off. Ends it after `seconds`, or when this process is ended."""
    code = log.with_suffix(".code")
    code.unlink(missing_ok=True)
    disks = [
        argument
        for number, image in enumerate((root / "root.img", kernel.modules, tar))
        for argument in (
            "-drive",
            f"if=none,id=d{number},format=raw,readonly=on,file={image}",
            "-device",
            f"virtio-blk-pci,drive=d{number}",
        )
    ]
    command = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-nic", "none", "-machine", "q35", *accelerator.split(" ")),
        *("-m", f"{memory}", "-smp", f"{cpus}", "-kernel", f"{kernel.image}"),
        *("-initrd", f"{kernel.initrd}", "-append", "console=ttyS0 quiet panic=-1"),
        *disks,
        *("-serial", f"file:{log}", "-serial", f"file:{code}"),
    ]
    began = time.monotonic()
    with subprocess.Popen(
        ["nice", "-n", "10", *command],
        stdin=subprocess.DEVNULL,
        stderr=log.with_suffix(".qemu").open("w"),
    ) as machine:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.wait(seconds)
        finally:
            machine.kill()
    text = code.read_text().strip() if code.exists() else ""
    return Result(kernel, int(text) if text.isdigit() else None, time.monotonic() - began, log)


TCG = "-accel tcg,thread=multi -cpu max"
KVM = "-accel kvm -cpu host"


def accelerator(kernel: Kernel, root: Path, logs: Path) -> str:
    """KVM if a machine boots with it. That /dev/kvm is there says nothing: where the host is
    a virtual machine itself, a kernel may hang in it for ever."""
    need("qemu-system-x86_64")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    tar = logs / "probe.tar"
    tree(tar, ["true"], {})
    probed = boot(kernel, root, tar, logs / "probe.log", accelerator=KVM, seconds=_PROBE)
    tar.unlink()
    return KVM if probed.code == 0 else TCG
