"""Which clients of processes and pods have which endpoint, as rows for people and scripts. Pure."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

from pointsman import abi
from pointsman.inspect import UNKNOWN, Reader, held
from pointsman.values import Backend, endpoint_text, is_ipv4

_layouts = abi.layouts()


@dataclass(frozen=True, slots=True)
class AffinityRow:
    """The endpoint that one client has of one service port. Times in seconds.

    `client` is "host" for the host's network namespace, else its cookie, `netns`. `seen` is
    CLOCK_MONOTONIC in ns. `state` is "valid", "expired", or "left" if the endpoint is not in the
    set any more: the next connection chooses anew unless it is valid.
    """

    client: str
    netns: int
    namespace: str
    service: str
    port: str
    family: str
    endpoint: str
    state: str
    seen: int
    timeout_seconds: int
    # Not compared: what has only grown older has not changed.
    age_seconds: float = field(compare=False)
    left_seconds: float = field(compare=False)


def affinity(reader: Reader, now: int) -> list[AffinityRow]:
    """Every client that the kernel remembers, by service port. `now` is CLOCK_MONOTONIC in ns."""
    names, host = reader.names(), reader.settings()["host_netns"]
    timeouts: dict[tuple[int, int], int] = {}
    members: dict[tuple[int, int], set[Backend]] = {}
    for each in held(reader):
        key = each.element.owner, 4 if is_ipv4(each.frontend.address) else 6
        timeouts[key] = max(timeouts.get(key, 0), each.element.affinity)
        members.setdefault(key, set()).update(slot.backend for slot in each.slots)
    rows = []
    for raw_key, raw in reader.items("affinity"):
        client, entry = decode_affinity(raw_key, raw)
        key = client["owner"], client["family"]
        name = names.get(client["owner"], UNKNOWN)
        timeout = timeouts.get(key, 0)
        backend = entry["addr"], entry["port"]
        # Refreshed since `now` was read: not in the future.
        age = max(now - entry["seen"], 0) / 1e9
        left = max(timeout - age, 0.0)
        state = "expired" if age > timeout else "valid"
        if backend not in members.get(key, ()):
            state = "left"
        rows.append(
            AffinityRow(
                client=client_name(client["netns"], host),
                netns=client["netns"],
                namespace=name.namespace,
                service=name.service,
                port=name.port,
                family=f"IPv{client['family']}",
                endpoint=endpoint_text(*backend),
                state=state,
                seen=entry["seen"],
                timeout_seconds=timeout,
                age_seconds=round(age, 1),
                left_seconds=round(left, 1) if state == "valid" else 0.0,
            )
        )
    return sorted(rows, key=lambda r: (r.namespace, r.service, r.port, r.family, r.netns))


def decode_affinity(key: bytes, value: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Key and value of the map `affinity`, the port as people write it."""
    entry = _layouts["affinity"].decode(value)
    return _layouts["affinity_key"].decode(key), {**entry, "port": socket.ntohs(entry["port"])}


def client_name(netns: int, host: int) -> str:
    return "host" if host and netns == host else str(netns)
