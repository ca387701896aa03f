"""Asks the kernel, by the programs that every distribution has for it, what kube-proxy made."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pointsman import netlink
from pointsman.errors import PointsmanError
from pointsman.kubeproxy import iptables, ipvs, nft
from pointsman.kubeproxy.retire import Running, running_as
from pointsman.kubeproxy.rules import Ruleset
from pointsman.values import Address

_NAME = "kube-proxy"
#: What iptables-save says in place of a table, with success as its exit code.
_INCOMPATIBLE = "is incompatible, use 'nft' tool"
_PATIENCE = 120  # seconds for one listing
#: Both ways of a family to have iptables; the plain name is one of the two.
_SAVES = (
    (("iptables-nft-save", "iptables-legacy-save"), "iptables-save", False),
    (("ip6tables-nft-save", "ip6tables-legacy-save"), "ip6tables-save", True),
)


@dataclass(frozen=True, slots=True)
class Programmed:
    """One family of one mode: `mode` is "nftables", "iptables" or "ipvs"."""

    mode: str
    family: str
    proxy: Ruleset | ipvs.Servers


def programmed(local: frozenset[Address]) -> list[Programmed]:
    """What kube-proxy has in the kernel, of every mode: a former one may have left something.
    Raises PointsmanError if that can't be said."""
    found = [*_nftables(local), *_iptables(local), *_ipvs()]
    lacking = [name for name in ("nft", "iptables-save") if not shutil.which(name)]
    if not found and lacking:
        raise PointsmanError(
            f"{' and '.join(lacking)}: not found, so it can't be said what kube-proxy serves; "
            "install nftables and iptables, or run this on the host"
        )
    return found


def _family(ipv6: bool) -> str:
    return "IPv6" if ipv6 else "IPv4"


def _nftables(local: frozenset[Address]) -> Iterator[Programmed]:
    if not shutil.which("nft"):
        return
    for family, ipv6 in (("ip", False), ("ip6", True)):
        text = _run("nft", "--json", "list", "table", family, nft.TABLE, absent="No such file")
        try:
            rules = nft.parse_tables(text, local, ipv6=ipv6) if text else None
        except ValueError as error:
            raise PointsmanError(f"nft --json: {error}") from None
        if rules:
            yield Programmed("nftables", _family(ipv6), rules)


def _iptables(local: frozenset[Address]) -> Iterator[Programmed]:
    for both, plain, ipv6 in _SAVES:
        names = [name for name in both if shutil.which(name)]
        for name in names or ([plain] if shutil.which(plain) else []):
            text = _run(name)
            if _INCOMPATIBLE in text:
                raise PointsmanError(
                    f"{name} can't show a table, since others put rules of nft into it; so it "
                    "can't be said what kube-proxy serves"
                )
            rules = iptables.parse_save(text, local, ipv6=ipv6)
            if rules:
                yield Programmed("iptables", _family(ipv6), rules)


def _ipvs() -> Iterator[Programmed]:
    """Virtual servers are kube-proxy's only where its device is."""
    own = netlink.ipvs_addresses()
    if own is None:
        return
    if not shutil.which("ipvsadm"):
        raise PointsmanError(
            "kube-proxy's device for IPVS is here, but no ipvsadm to ask what is served: install "
            "ipvsadm"
        )
    text = _run("ipvsadm", "--save", "--numeric")
    for ipv6 in (False, True):
        servers = ipvs.parse_save(text, own, ipv6=ipv6)
        if servers:
            yield Programmed("ipvs", _family(ipv6), servers)


def _run(*command: str, absent: str = "") -> str:
    """What it prints; "" if it fails with this text, since there is nothing of the kind."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise PointsmanError(f"{' '.join(command)} took more than {_PATIENCE} s") from None
    if done.returncode == 0:
        return done.stdout
    if absent and absent in done.stderr:
        return ""
    said = done.stderr.strip() or "failed"
    if "ermission denied" in said or "not permitted" in said:
        said += "; run this on the node itself, as root: a container may lack CAP_NET_RAW for it"
    raise PointsmanError(f"{' '.join(command)}: {said}")


def running() -> list[Running]:
    """The processes of kube-proxy in this network namespace: nodes of a test have their own."""
    here = Path("/proc/self/ns/net").stat().st_ino
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if not process.name.isdecimal() or (process / "comm").read_text().strip() != _NAME:
                continue
            if (process / "ns/net").stat().st_ino == here:
                found.append(_running(process))
    return found


def agent(pid: int | None) -> Running | None:
    """Pointsman's, if it runs."""
    with contextlib.suppress(OSError):
        return _running(Path("/proc", str(pid))) if pid else None
    return None


def _running(process: Path) -> Running:
    program = str((process / "exe").readlink())
    cgroup, environment = (process / "cgroup").read_text(), (process / "environ").read_bytes()
    return running_as(int(process.name), cgroup, program, environment)
