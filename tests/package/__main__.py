"""Installs, upgrades, downgrades, removes and purges the Debian package in a machine with systemd,
under load: `debian.sh` is what is done there. Then the same with `make install`: `prefix.sh`.

    python -m tests.package [--deb FILE] [--kernel 6.1] [SCRIPT …]

Machines are those of tests/vm.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from pathlib import Path

from pointsman.hooks import FEATURES
from pointsman.pins import Sizes
from tests.kernel.test_upgrades import CHANGES
from tests.vm import image, machine, packages, programs

SCRIPTS = ("debian", "prefix")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.package", description=__doc__)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--deb", type=Path, help="without it, one is built")
    parser.add_argument("--kernel", default="6.1", choices=packages.SUITES)
    parser.add_argument("--minutes", type=float, default=40.0, help="for the machine")
    parser.add_argument("--accel", choices=("tcg", "kvm"), help="without trying what works")
    given = parser.parse_args()
    scripts = given.scripts or [*SCRIPTS]
    if unknown := set(scripts) - {*SCRIPTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    packages.need("qemu-system-x86_64", "mke2fs", "mmdebstrap", "dpkg-deb", "git")
    root = image.node()
    kernel = image.kernel(given.kernel, root / "busybox")
    logs = packages.cache() / "logs" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-package"
    logs.mkdir(parents=True)
    how = {"tcg": machine.TCG, "kvm": machine.KVM}.get(given.accel) or machine.accelerator(
        kernel, root, logs
    )
    tar, log = logs / "tree.tar", logs / "node.log"
    with tempfile.TemporaryDirectory() as directory:
        work, more = Path(directory), {}
        first = given.deb or build()
        trees = [work / "1"]
        packages.run("dpkg-deb", "-x", first, trees[0])
        if "debian" in scripts:
            more = {"dist/1.deb": first, "dist/2.deb": newer(first, work)}
            trees.append(work / "2")
        more |= compiled(trees, work / "compiled")
        commands = " && ".join(f"tests/package/{name}.sh" for name in scripts)
        machine.tree(tar, ["bash", "-c", commands], {}, more)
    print(f"package: {how}; {kernel.release}; log in {log}", flush=True)
    result = machine.boot(
        kernel, root, tar, log,
        accelerator=how, seconds=60 * given.minutes, memory=4096, cpus=2,
    )  # fmt: skip
    tar.unlink()
    shown = log.read_text(errors="replace").replace("\r", "").splitlines()
    print("\n".join(line for line in shown if line.startswith(("== ", "FAILED", "from "))))
    print(f"package: exit code {result.code}, {result.seconds:.0f} s")
    return 0 if result.code == 0 else 1


def build() -> Path:
    return image.TREE / packages.run(image.TREE / "scripts/deb").strip()


def newer(package: Path, work: Path) -> Path:
    """The same with +1 behind its version, and maps of another layout: an upgrade replaces them."""
    tree, made = work / "2", work / "2.deb"
    packages.run("dpkg-deb", "-R", package, tree)
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines()
    control.write_text(
        "".join(f"{each}+1\n" if each.startswith("Version: ") else f"{each}\n" for each in lines)
    )
    for name, old, new in CHANGES["the layout"][0]:
        path = sources(tree) / name
        text = path.read_text()
        if text.count(old) != 1:
            raise packages.CannotRun(f"{name} does not have: {old}")
        path.write_text(text.replace(old, new))
    packages.run("dpkg-deb", "-Zgzip", "-z1", "-b", tree, made)
    return made


def sources(tree: Path) -> Path:
    """Of the programs, in a package that is unpacked."""
    [found] = tree.rglob("site-packages/pointsman/bpf")
    return found


def compiled(trees: list[Path], to: Path) -> dict[str, Path]:
    """Directories of what an emulated CPU would need minutes for, by their names in the machine.
    The programs for sockets of the first are apart: a unit that has to compile them shows that its
    sandbox lets it."""
    apart = to / "sockets"
    for tree in trees:
        os.environ["POINTSMAN_COMPILED"] = str(to / "others")
        programs.packets(sources(tree), Sizes())
        if tree is trees[0]:
            os.environ["POINTSMAN_COMPILED"] = str(apart)
        programs.sockets(sources(tree), Sizes(), FEATURES[0])
    return {".vm/sockets": apart, ".vm/compiled": to / "others"}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except packages.CannotRun as error:
        sys.exit(f"package: {error}")
