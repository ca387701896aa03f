"""How one agent runs: what `pointsman up` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pointsman.context import Policy
from pointsman.devices import Packets
from pointsman.events import Problem
from pointsman.generations import Sizes
from pointsman.kube.access import Access


@dataclass(frozen=True, slots=True)
class Settings:
    """Paths are absolute, addresses as people write them."""

    bpffs: Path = Path("/sys/fs/bpf/pointsman")
    cgroup: Path = Path("/sys/fs/cgroup")
    run_dir: Path = Path("/run/pointsman")
    state_dir: Path = Path("/var/lib/pointsman")
    manifests: Path = Path("/etc/pointsman/manifests")
    service_cidrs: tuple[str, ...] = ("10.96.0.0/12",)
    domain: str = "cluster.local"
    dns_listen: tuple[tuple[str, int], ...] = ()
    #: None: whatever /etc/resolv.conf says at the time.
    dns_upstreams: tuple[tuple[str, int], ...] | None = ()
    sizes: Sizes = field(default_factory=Sizes)
    #: Name of this node's Node object; "" if it has none.
    node_name: str = ""
    policy: Policy = field(default_factory=Policy)
    packets: Packets = field(default_factory=Packets)
    #: The API server to follow instead of `manifests`.
    api: Access | None = None
    #: Where /healthz, /livez and /readyz are answered, and /metrics; None is nowhere.
    healthz: tuple[str, int] | None = None
    metrics: tuple[str, int] | None = None
    #: Connections of removed endpoints are ended as well, not only UDP sockets.
    end_tcp: bool = False


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """The operator wants other settings. None: what was written is bad, or gone, so that what was
    in force stays so. `problems` replace those of the configuration before."""

    settings: Settings | None
    problems: tuple[Problem, ...] = ()
