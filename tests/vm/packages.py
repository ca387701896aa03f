"""Debian's packages, by a private apt: its own lists and cache, this machine's archive and keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

#: Kernels by the name that a person gives, with the suite of Debian that has them.
SUITES = {
    "5.10": "bullseye",
    "6.1": "bookworm",
    "6.12": "trixie",
    "newest": "trixie-backports",
}
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class CannotRun(Exception):
    """What is missing, and what to do."""


def cache() -> Path:
    """Where all of this is kept: some 2 GB, which may be removed at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = Path(base) / "pointsman-vm"
    found.mkdir(parents=True, exist_ok=True)
    return found


def run(*command: str | Path, **more: object) -> str:
    """What it printed; CannotRun with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", **more)  # type: ignore[call-overload]
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise CannotRun(f"'{' '.join(map(str, command[:4]))} …' failed:\n{said}")
    return str(done.stdout)


def need(*programs: str) -> None:
    """Names the packages of those that are missing."""
    packages = {
        "qemu-system-x86_64": "qemu-system-x86",
        "busybox": "busybox-static",
        "mke2fs": "e2fsprogs",
        "qemu-img": "qemu-utils",
    }
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = [packages.get(name, name) for name in programs if not shutil.which(name, path=path)]
    if lacking:
        raise CannotRun(
            f"missing: apt-get install --no-install-recommends {' '.join(sorted(set(lacking)))}"
        )


def archive() -> str:
    """Where this machine gets Debian's packages."""
    told = run("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)")
    for line in told.splitlines():
        origin, label, address = line.split("|")
        if (origin, label) == ("Debian", "Debian"):
            return address
    raise CannotRun("the apt sources of this machine have no Debian archive: run this on Debian")


def _apt(suite: str) -> dict[str, str]:
    """The environment in which apt knows this suite and nothing else."""
    root = cache() / "apt" / suite
    for each in ("state/lists/partial", "cache/archives/partial", "none"):
        (root / each).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    (root / "sources").write_text(f"deb [signed-by={_KEYS}] {archive()} {suite} main\n")
    # How archives are reached (a proxy, certificates) stays as it is; hooks of the host do not run.
    (root / "conf").write_text(
        run("apt-config", "dump", "Acquire")
        + f'Dir::State "{root}/state"; Dir::State::status "{root}/status";\n'
        f'Dir::Cache "{root}/cache"; Dir::Etc::SourceList "{root}/sources";\n'
        f'Dir::Etc::SourceParts "{root}/none"; Dir::Etc::Parts "{root}/none";\n'
        'APT::Sandbox::User "root"; Acquire::Languages "none";\n'
    )
    return {**os.environ, "APT_CONFIG": str(root / "conf")}


def kernel(name: str) -> tuple[str, list[Path]]:
    """Its release, as uname -r says it, and its packages; fetched if they are not here."""
    suite = SUITES[name]
    kept = cache() / "packages" / name
    if found := sorted(kept.glob("*.deb")):
        return (kept / "release").read_text(), found
    environment = _apt(suite)
    run("apt-get", "update", "-q", env=environment)
    flavour = f"cloud-{run('dpkg', '--print-architecture').strip()}"
    first = _needs(f"linux-image-{flavour}", environment)
    release = next(
        (m[1] for one in first if (m := re.fullmatch(r"linux-image-(\d.*)", one))),
        "",
    )
    if not release:
        raise CannotRun(f"{suite} has no linux-image-{flavour}")
    # Since 7.0 a kernel is several packages, all of the same release.
    wanted, todo = set[str](), [f"linux-image-{release}"]
    while todo:
        one = todo.pop()
        wanted.add(one)
        todo += [
            more
            for more in _needs(one, environment)
            if re.match(r"linux-(image|binary|modules|base)-\d", more) and more not in wanted
        ]
    fresh = kept.with_name(f"{name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    run("apt-get", "download", "-q", *sorted(wanted), env=environment, cwd=fresh)
    (fresh / "release").write_text(release)
    shutil.rmtree(kept, ignore_errors=True)
    fresh.rename(kept)
    return release, sorted(kept.glob("*.deb"))


def _needs(package: str, environment: dict[str, str]) -> list[str]:
    told = run("apt-cache", "depends", "--important", "--no-recommends", package, env=environment)
    return re.findall(r"(?:Pre)?Depends: ([^\s<>]+)", told)
