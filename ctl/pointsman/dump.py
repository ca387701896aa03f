"""Each map decoded: what `map list` counts and what `map dump` shows. Pure.

Addresses and ports come as people write them, flags and enumerators by name; elements that are
free are left out.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pointsman import abi, dumppackets
from pointsman.affinityrows import client_name, decode_affinity
from pointsman.inspect import (
    PLACES,
    RETIRED,
    UNKNOWN,
    Reader,
    algorithm_name,
    choice_names,
    cidr_text,
    empty_name,
    flag_names,
    held,
    outside_empty_name,
    packets_names,
    skipped_netns,
)
from pointsman.maglev import lines_of, stamp
from pointsman.plan import Element, Run, Slot
from pointsman.ranges import source_text
from pointsman.shares import ELSEWHERE, normal
from pointsman.values import PROTOCOL_NAMES, PortName, endpoint_text

#: Number of the map type to its name (enum bpf_map_type).
TYPES = {
    1: "hash",
    2: "array",
    6: "percpu_array",
    9: "lru_hash",
    11: "lpm_trie",
    24: "sk_storage",
    27: "ringbuf",
}
_BUSY = 1 << 63  # COOKIE_BUSY of bpf/record.h
_layouts = abi.layouts()
# Of any version: generation and open connections came first in all of them.
_read_load = struct.Struct("=2I").unpack_from
_read_share = _layouts["share"].reader("keep", "other", "weight")
_COUNTED_OPEN = abi.constants()["COUNTED_OPEN"]

Row = dict[str, Any]
#: Of which there are always as many: how full they are says nothing.
_FIXED = ("counters", "settings", *dumppackets.FIXED)


class Source(Reader, Protocol):
    """A Reader with the counters, which nothing else reads."""

    def counters(self) -> dict[str, int]: ...
    def packet_counters(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class MapRow:
    """How full one map is. `used` is None where that can't be counted from outside."""

    name: str
    type: str
    used: int | None
    max: int
    fill_percent: float | None
    memory_bytes: int


def map_row(name: str, kind: int, entries: int, used: int | None, memory_bytes: int) -> MapRow:
    """`entries`: max_entries of the map. An element of `sockets_more` holds several records."""
    if name == "sockets_more":
        entries *= abi.constants()["MORE_PLACES"]
    fill = None
    if used is not None and entries and name not in _FIXED:
        fill = round(100 * used / entries, 1)
    return MapRow(name, TYPES.get(kind, f"type {kind}"), used, entries, fill, memory_bytes)


def used(source: Source, name: str) -> int | None:
    """How many elements of a map are in use; None for the storage that lives in sockets."""
    if name == "services":
        return sum(1 for _ in _elements(source))
    if name in ("slots", "shares"):
        return sum(count for _, count in extents(source))
    if name == "load":
        return sum(1 for generation in source.generations().values() if not generation & RETIRED)
    if name == "maglev":
        return sum(lines_of(run.count) for run in _tables(source))
    if name in dumppackets.FLOWS:
        return sum(1 for _ in source.items(name))
    if name in DUMPS:
        return sum(1 for _ in DUMPS[name](source))
    return None


def _elements(source: Source) -> Iterator[tuple[int, Element]]:
    for ident in source.owned():
        yield ident, source.service(ident)


def extents(source: Source) -> list[tuple[int, int]]:
    """(first slot, count) of every set in use, each once: Services' VIPs share them."""
    return sorted({run for _, element in _elements(source) for run in element.runs})


def _tables(source: Source) -> set[Run]:
    return {table for _, element in _elements(source) for table in element.tables}


# -- one function for each map -------------------------------------------------------------------


def _marks(source: Source) -> Iterator[Row]:
    for key, value in source.items("marks"):
        if word := _number(value):
            yield {"word": _number(key), "bits": f"{word:016x}", "addresses": word.bit_count()}


def _frontends(source: Source) -> Iterator[Row]:
    for frontend, service in sorted(source.frontends().items()):
        yield {"frontend": str(frontend), "service": service}


def _services(source: Source) -> Iterator[Row]:
    names = source.names()
    for ident, element in _elements(source):
        yield {
            "id": ident,
            "frontend": str(element.frontend),
            "owner": element.owner,
            "name": _owner_name(names, element.owner),
            "algorithm": algorithm_name(element.algorithm),
            "choice": list(choice_names(element.algorithm)),
            "affinitySeconds": element.affinity,
            "flags": list(flag_names(element.flags)),
            "firstSlot": element.first if element.count else None,
            "count": element.count,
            "whenEmpty": _when_empty(element),
            "insideFirstLine": element.inside.first if element.inside.count else None,
            "insideEntries": element.inside.count or None,
            "packets": list(packets_names(element.packets)),
            "outsideFirstSlot": element.outside.first if element.outside.count else None,
            "outsideCount": element.outside.count if element.packets else None,
            "outsideWhenEmpty": outside_empty_name(element) or None,
            "tableFirstLine": element.table.first if element.table.count else None,
            "tableEntries": element.table.count or None,
        }


def _when_empty(element: Element) -> str | None:
    """None also for an address at which undefined ports are no error."""
    passes = element.frontend.wildcard and element.flags
    return None if element.count or passes else empty_name(element.first)


def _owner_name(names: Mapping[int, PortName], owner: int) -> str:
    return str(names[owner]) if owner in names else ""


def _slots(source: Source) -> Iterator[Row]:
    names = source.names()
    for first, count in extents(source):
        for index, slot in enumerate(source.slots(first, count), first):
            yield {
                "slot": index,
                "endpoint": endpoint_text(*slot.backend),
                "id": slot.endpoint,
                "generation": slot.generation,
                "owner": slot.owner,
                "name": _owner_name(names, slot.owner),
                "place": PLACES.get(slot.place),
                "weight": slot.weighs,
                "otherZone": slot.elsewhere,
            }


def _shares(source: Source) -> Iterator[Row]:
    """`keep` of 2^32 draws that hit a slot are its own, the others those of the place `other`."""
    taken = {first + i for first, count in extents(source) for i in range(count)}
    for key, value in source.items("shares"):
        if (slot := _number(key)) in taken:
            keep, other, weight = _read_share(value)
            yield {
                "slot": slot,
                "weight": weight & (ELSEWHERE - 1),
                "otherZone": bool(weight & ELSEWHERE),
                "keep": keep,
                "other": other,
            }


def _policies(source: Source) -> Iterator[Row]:
    names = source.names()
    for owner, element in sorted(source.policies().items()):
        policy = element.policy
        yield {
            "owner": owner,
            "name": _owner_name(names, owner),
            "watch": policy.watch,
            "maxConnections": policy.max_connections or None,
            "room": policy.room,
            "streak": policy.streak or None,
            "percent": policy.percent or None,
            "volume": policy.volume,
            "shortestSeconds": policy.shortest / 1e9,
            "longestSeconds": policy.longest / 1e9,
            "trialSeconds": policy.trial / 1e9,
            "most": element.most,
            "ejected": source.ejected(owner),
        }


def _turns(source: Source) -> Iterator[Row]:
    keys = {ident: frontend for frontend, ident in source.frontends().items()}
    for key, value in source.items("turns"):
        if turn := _number(value):
            service = _number(key)
            frontend = str(keys[service]) if service in keys else ""
            yield {"service": service, "frontend": frontend, "turn": turn}


def _maglev(source: Source) -> Iterator[Row]:
    """One row for each table: "stale" if it was made for other endpoints than the set has."""
    found: dict[Run, tuple[Element, PortName, tuple[Slot, ...], tuple[int, ...]]] = {}
    for each in held(source):
        element, weights = each.element, normal([slot.weight for slot in each.slots])
        outside = normal([slot.weight for slot in each.outside])
        found[element.inside] = (element, each.name, each.slots, weights)
        found[element.table] = (element, each.name, each.outside, outside)
    for run, (element, name, slots, weights) in sorted(found.items()):
        if not run.count:
            continue
        current = source.stamp(run) == stamp([slot.backend for slot in slots], weights)
        yield {
            "firstLine": run.first,
            "lines": lines_of(run.count),
            "entries": run.count,
            "endpoints": len(slots),
            "owner": element.owner,
            "name": "" if name == UNKNOWN else str(name),
            "state": "current" if current else "stale",
        }


def _source_ranges(source: Source) -> Iterator[Row]:
    keys = {ident: frontend for frontend, ident in source.frontends().items()}
    for service, found in sorted(source.ranges().items()):
        for one in sorted(found):
            yield {
                "service": service,
                "frontend": str(keys[service]) if service in keys else "",
                "range": source_text(one),
            }


def _load(source: Source) -> Iterator[Row]:
    names = source.names()
    for ident, raw in source.generations().items():
        _, opened = source.load(ident)
        if not raw & RETIRED or opened:
            known = source.outcomes(ident)
            yield {
                "id": ident,
                "generation": raw & ~RETIRED,
                "state": "retired" if raw & RETIRED else "valid",
                "open": opened,
                "owner": known.owner,
                "name": _owner_name(names, known.owner),
                "connectMicroseconds": known.latency or None,
                "measured": known.measured or None,
                "connects": known.connects,
                "failures": known.failures,
                "streak": known.streak,
                "ejections": known.ejections,
                "ejectedUntil": known.until or None,
                "trial": known.trial,
            }


def _raw_load(name: str) -> Callable[[Source], Iterator[Row]]:
    def rows(source: Source) -> Iterator[Row]:
        for key, value in source.items(name):
            generation, opened = _read_load(value)
            if generation and (not generation & RETIRED or opened):
                yield {
                    "id": _number(key),
                    "generation": generation & ~RETIRED,
                    "state": "retired" if generation & RETIRED else "valid",
                    # Below zero until an upgrade has added up both maps.
                    "open": opened - (1 << 32) if opened >= 1 << 31 else opened,
                }

    return rows


def _names(source: Source) -> Iterator[Row]:
    for ident, name in sorted(source.names().items()):
        yield {
            "id": ident,
            "namespace": name.namespace,
            "service": name.service,
            "port": name.port,
        }


def _counters(source: Source) -> Iterator[Row]:
    for name, value in source.counters().items():
        yield {"counter": name, "value": value}


def _settings(source: Source) -> Iterator[Row]:
    known = source.settings()
    yield {
        "hostNetns": known["host_netns"] or None,
        "skipped": known["skipped"],
        "refusedCidrs": [cidr_text(*cidr) for cidr in known["cidrs"]],
    }


def _skipped_netns(source: Source) -> Iterator[Row]:
    for cookie in skipped_netns(source):
        yield {"netns": cookie}


def _affinity(source: Source) -> Iterator[Row]:
    names, host = source.names(), source.settings()["host_netns"]
    for raw_key, raw in source.items("affinity"):
        key, entry = decode_affinity(raw_key, raw)
        yield {
            "netns": key["netns"],
            "client": client_name(key["netns"], host),
            "owner": key["owner"],
            "name": _owner_name(names, key["owner"]),
            "family": key["family"],
            "endpoint": endpoint_text(entry["addr"], entry["port"]),
            "seen": entry["seen"],
        }


def _record(record: Mapping[str, Any]) -> Row:
    return {
        "vip": endpoint_text(record["vip"], socket.ntohs(record["vip_port"])),
        "peer": endpoint_text(record["peer"], socket.ntohs(record["peer_port"])),
        "protocol": PROTOCOL_NAMES.get(record["proto"], str(record["proto"])),
        "id": record["endpoint"],
        "generation": record["generation"],
        "counted": bool(record["counted"] & _COUNTED_OPEN),
    }


def _sockets(source: Source) -> Iterator[Row]:
    for key, value in source.items("sockets"):
        yield from _places(_number(key), first_place(value))


def _sockets_more(source: Source) -> Iterator[Row]:
    for key, value in source.items("sockets_more"):
        yield from _places(_number(key), more_places(value))


def _places(bucket: int, places: Iterable[Place]) -> Iterator[Row]:
    for cookie, record in places:
        yield {
            "bucket": bucket,
            "cookie": cookie & ~_BUSY,
            "state": "busy" if cookie & _BUSY else "in use",
            **_record(record),
        }


#: The cookie of a place that is in use or busy, with its record.
Place = tuple[int, dict[str, Any]]


def first_place(bucket: bytes) -> list[Place]:
    """The place in an element of `sockets`, if it is taken."""
    if not any(bucket[:8]):
        return []  # nearly all of them: not worth decoding
    place = _layouts["bucket"].decode(bucket)["first"]
    return [(place["cookie"], place["record"])]


def more_places(more: bytes) -> list[Place]:
    """The taken places in an element of `sockets_more`."""
    if not any(more):
        return []
    places = _layouts["more"].decode(more)["place"]
    return [(place["cookie"], place["record"]) for place in places if place["cookie"]]


def _sockets_overflow(source: Source) -> Iterator[Row]:
    for key, value in source.items("sockets_overflow"):
        overflow = _layouts["overflow"].decode(value)
        yield {"cookie": _number(key), "netns": overflow["netns"], **_record(overflow["record"])}


def _overflow_netns(source: Source) -> Iterator[Row]:
    for key, value in source.items("overflow_netns"):
        yield {"netns": _number(key), "records": _number(value)}


def _destroyed(source: Source) -> Iterator[Row]:
    for key, _ in source.items("destroyed"):
        yield {"cookie": _number(key)}


def _mptcp(source: Source) -> Iterator[Row]:
    for key, value in source.items("mptcp"):
        yield {"address": f"{_number(key):#x}", **_record(_layouts["socket"].decode(value))}


def _number(data: bytes) -> int:
    return int(struct.unpack("=I" if len(data) == 4 else "=Q", data)[0])


#: What can't be listed from outside, and why.
UNLISTED = {
    "datagrams": "what it holds is stored in the sockets themselves",
    **dumppackets.UNLISTED,
}
#: By the name in bpf/maps.h.
DUMPS: dict[str, Callable[[Source], Iterator[Row]]] = {
    "marks": _marks,
    "frontends": _frontends,
    "services": _services,
    "slots": _slots,
    "shares": _shares,
    "policies": _policies,
    "turns": _turns,
    "maglev": _maglev,
    "source_ranges": _source_ranges,
    "load": _load,
    "previous_load": _raw_load("previous_load"),
    "names": _names,
    "settings": _settings,
    "skipped_netns": _skipped_netns,
    "counters": _counters,
    "sockets": _sockets,
    "sockets_more": _sockets_more,
    "sockets_overflow": _sockets_overflow,
    "overflow_netns": _overflow_netns,
    "affinity": _affinity,
    "destroyed": _destroyed,
    "mptcp": _mptcp,
    **dumppackets.DUMPS,
}
