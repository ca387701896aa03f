"""Looks at this node for the reading commands: pins, links, status file, cgroups. Only reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pointsman import dump, host, loading, netns, state
from pointsman.errors import NotLoaded
from pointsman.generations import Generation
from pointsman.health import Observation
from pointsman.hooks import LOST
from pointsman.packethealth import PacketsSeen
from pointsman.packetmaps import PacketMaps
from pointsman.pins import Pins
from pointsman.view import View


def read_status(run_dir: Path) -> dict[str, Any]:
    found = state.read_json(run_dir / state.STATUS)
    return found if isinstance(found, dict) else {}


def observe(bpffs: Path, run_dir: Path, now: float) -> Observation:
    """Raises NotLoaded when nothing is pinned under `bpffs`."""
    pins = Pins(bpffs)
    generation = pins.require_current()
    view = View(generation.maps, generation.packets.maps)
    try:
        links = tuple(pins.links())
        status = read_status(run_dir)
        configured = (status.get("settings") or {}).get("cgroup")
        idents = {link.cgroup for link in links if link.cgroup}
        return Observation(
            pid=state.running(run_dir),
            status=status,
            generation=generation.name,
            links=links,
            cgroup_paths=cgroup_paths(idents, Path(configured) if configured else None),
            maps=tuple(map_rows(view, generation)),
            mapped_bytes=view.mapped_bytes,
            counters=view.counters(),
            now=now,
            kernel=os.uname().release,
            lacks=tuple(lacks()),
            packets=packets_seen(generation),
            device_links=tuple(pins.device_links()),
        )
    finally:
        view.close()


def lacks() -> Iterator[str]:
    """What this kernel can't do that a Service's user would notice."""
    for name in loading.lacking():
        yield LOST[name]
    try:
        netns.cookie()
    except OSError as error:
        yield f"NodePorts at 127.0.0.1, the bind guard and opt-outs of pods are off: {error}"


def packets_seen(generation: Generation) -> PacketsSeen | None:
    """None where no packet programs are."""
    try:
        maps = PacketMaps(generation.packets.maps)
    except NotLoaded:
        return None
    try:
        return PacketsSeen(maps.counters(), maps.ports, maps.dsr)
    finally:
        maps.close()


def map_rows(view: View, generation: Generation) -> list[dump.MapRow]:
    """A row for each pinned map, in the order of their names."""
    rows = []
    for name in view.names_of_maps:
        opened = view.map(name)
        kind, entries = opened.info.type, opened.info.max_entries
        rows.append(dump.map_row(name, kind, entries, dump.used(view, name), _memory(opened.fd)))
    return rows


def _memory(fd: int) -> int:
    """What the kernel accounts for a map: the memlock line of its fdinfo."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    return 0


def cgroup_paths(idents: set[int], configured: Path | None = None) -> dict[int, str]:
    """Paths of the cgroups with these inode numbers, as far as they are found."""
    found: dict[int, str] = {}
    left = set(idents)
    for root in ([configured] if configured else []) + host.mounts("cgroup2"):
        if not left:
            break
        for directory, below, _ in os.walk(root):
            ident = _inode(directory)
            if ident in left:
                found[ident] = directory
                left.discard(ident)
            if not left or root == configured:
                below.clear()
    return found


def _inode(path: str) -> int:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return 0
