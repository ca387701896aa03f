"""Ranges of ports as net.ipv4.ip_local_reserved_ports writes them: 8080,30000-32767. Pure."""

from __future__ import annotations

from collections.abc import Iterable

#: First and last port of each range: sorted, with a gap between any two.
Ranges = tuple[tuple[int, int], ...]


def parse(text: str) -> Ranges:
    """Raises ValueError for what is no list of ports."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        found.append((int(first), int(last or first)))
        if not 0 <= found[-1][0] <= found[-1][1] <= 65535:
            raise ValueError(f"{part!r} is not a range of ports")
    return _joined(found)


def to_text(ranges: Ranges) -> str:
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def union(one: Ranges, other: Ranges) -> Ranges:
    return _joined((*one, *other))


def without(ranges: Ranges, taken: Ranges) -> Ranges:
    """What of `ranges` is not in `taken`."""
    left = list(ranges)
    for first, last in taken:
        cut = []
        for a, b in left:
            if a < first:
                cut.append((a, min(b, first - 1)))
            if b > last:
                cut.append((max(a, last + 1), b))
        left = cut
    return tuple(left)


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)
