"""Manifests in, maps out: each directory of tests/golden is a behaviour that one can read.

`context.toml` in it says where the agent is: `node`, `local_addresses`, `service_cidrs`, and what
was chosen as `[policy]`. The wildcards that lead from the addresses of nodes to NodePorts are shown
if it names any address. After "outside" stands what clients outside of the cluster get where it is
known where an endpoint is, or something else than inside. `UPDATE_GOLDEN=1 pytest
tests/unit/test_golden.py` writes what comes out now; read the difference.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pointsman import abi
from pointsman.choice import ALGORITHMS
from pointsman.clusterip import ClusterIPs
from pointsman.context import Context, Policy
from pointsman.manifests import ManifestSource
from pointsman.maps import apply
from pointsman.nodes import context_of
from pointsman.optout import opted_out
from pointsman.plan import Element, Limits
from pointsman.planner import Planner
from pointsman.ranges import source_text
from pointsman.tracker import Tracker
from pointsman.values import Backend, Frontend, endpoint_text, to_address, to_text
from pointsman.wanted import all_refs, node_ref, resolve_ref
from tests.support.fake import FakeDatapath

CASES = sorted(path for path in (Path(__file__).parent.parent / "golden").iterdir())
MASK = abi.constants()["ALGORITHM_MASK"]
# In the order of their values.
WORDS = {
    "SERVICE_NODE": "this node's NodePorts",
    "SERVICE_REMOTE_NODE": "NodePorts, at another node",
    "SERVICE_LOOPBACK": "NodePorts, for the host itself",
    "SERVICE_PASS": "untouched",
    "SERVICE_THIS_NODE": "not at other nodes",
    "SERVICE_HOST_NETNS": "for the host itself",
    "SERVICE_GUARDED": "guarded",
}
CHOICES = {
    "CHOICE_WEIGHTED": "by weight",
    "CHOICE_POLICY": "under a policy",
    "CHOICE_AVOID": "without outliers",
    "CHOICE_ZONE": "this zone first",
}
# "outside" stands before what else is said.
PACKETS = {"PACKETS_OUTSIDE": "outside", "PACKETS_LOCAL": "local"}
EMPTY = ("refused", "unreachable")


def outcome(directory: Path) -> str:
    listed, found = ManifestSource(directory).read()
    tracker = Tracker(ClusterIPs(["10.96.0.0/24", "fd00:96::/112"], {}))
    tracker.fold(listed)
    context = context_in(directory, tracker)
    problems = [*found.problems, *tracker.problems]
    wanted = {}
    for ref in sorted(all_refs(tracker, context)):
        if ref != node_ref(context) or context.local_addresses:
            wanted[ref], more = resolve_ref(ref, tracker, context)
            problems += more
    limits = Limits(256, 256, 256)
    maps = FakeDatapath(limits)
    planner = Planner(limits)
    apply(planner.replace(wanted), maps)
    out, more = opted_out(tracker.pods.values(), tracker.namespaces, context)
    problems += more
    said = [str(problem).replace(f"{directory}/", "") for problem in problems]
    said += [f"{ref}: {why}" for ref, why in planner.unplaced.items()]
    lines = [line(maps, frontend, *value) for frontend, value in sorted(maps.state().items())]
    lines += [f"sockets of {to_text(address)} are left alone" for address in sorted(out)]
    return "\n".join([*lines, *(f"! {text}" for text in sorted(said))]).strip() + "\n"


def context_in(directory: Path, tracker: Tracker) -> Context:
    path = directory / "context.toml"
    given: dict[str, Any] = tomllib.loads(path.read_text()) if path.exists() else {}
    policy = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.pop("policy", {}).items()
    }
    name, addresses = given.pop("node", ""), given.pop("local_addresses", ())
    cidrs = tuple(given.pop("service_cidrs", ()))
    assert not given, f"{path} says what nothing reads: {given}"
    local = frozenset(map(to_address, addresses))
    return context_of(tracker.nodes.values(), name, local, Policy(**policy), cidrs)


def line(maps: FakeDatapath, frontend: Frontend, endpoints: tuple[Backend, ...], empty: int) -> str:
    """10.0.0.1:30080/TCP default/web → 10.244.0.1:80 (guarded, affinity 10800 s); outside …"""
    element = maps.services[maps.frontends[frontend]]
    words = [word for name, word in WORDS.items() if element.flags & abi.constants()[name]]
    head = f"{frontend} {maps.names[element.owner]} →"
    if frontend.wildcard and words:
        return f"{head} {', '.join(words)}"
    if element.affinity:
        words.append(f"affinity {element.affinity} s")
    words += choice(element.algorithm)
    what = " ".join(endpoint_text(*backend) for backend in endpoints)
    more = f" ({', '.join(words)})" if words else ""
    return f"{head} {what or EMPTY[empty]}{more}{outside(maps, element)}"


def choice(algorithm: int) -> list[str]:
    """How one of them is chosen; nothing for at random."""
    name = {number: name for name, number in ALGORITHMS.items()}[algorithm & MASK]
    flags = [word for flag, word in CHOICES.items() if algorithm & abi.constants()[flag]]
    return [name, *flags] if algorithm else []


def outside(maps: FakeDatapath, element: Element) -> str:
    """What clients outside get; "" if they are not served, or just as those inside."""
    flags = [word for name, word in PACKETS.items() if element.packets & abi.constants()[name]]
    if not flags:
        return ""
    first, count = element.outside
    slots = [maps.slots[i] for i in range(first, first + count)] if count else []
    what = " ".join(
        endpoint_text(*backend) + ("", " here", " elsewhere")[place]
        for backend, _, _, _, place in slots
    )
    if element.outside == (element.first, element.count) and not any(slot[4] for slot in slots):
        what = "the same"
    ranges = sorted(maps.ranges.get(maps.frontends[element.frontend], ()))
    words = flags[1:]
    if element.packets & abi.constants()["PACKETS_RANGES"]:
        words.append(f"for {' '.join(map(source_text, ranges)) or 'nobody'}")
    if what == "the same" and not words:
        return ""
    return f"; outside {what or EMPTY[first]}" + (f" ({', '.join(words)})" if words else "")


@pytest.mark.parametrize("directory", CASES, ids=lambda path: path.name)
def test_golden(directory: Path) -> None:
    expected = directory / "maps.txt"
    found = outcome(directory)
    if os.environ.get("UPDATE_GOLDEN"):
        expected.write_text(found)
    assert found == expected.read_text()
