"""How service ports choose and deal with their endpoints, as the maps have it. Pure."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from pointsman import abi
from pointsman.shares import normal
from pointsman.values import Backend, Entry, Policy

_ABI = abi.constants()
_layout = abi.layouts()["policy"]
ALGORITHM_MASK = _ABI["ALGORITHM_MASK"]
MAGLEV = _ABI["ALGORITHM_MAGLEV"]
WEIGHTED, POLICY, AVOID, ZONE = (
    _ABI[f"CHOICE_{name}"] for name in ("WEIGHTED", "POLICY", "AVOID", "ZONE")
)
_WATCH = _ABI["POLICY_WATCH"]
_FIELDS = (
    "flags", "max_connections", "room", "streak", "percent", "volume", "shortest", "longest",
    "trial", "most",
)  # fmt: skip
_pack, _read = _layout.packer(*_FIELDS), _layout.reader(*_FIELDS)
#: What the agent writes of an element: all but what the programs do.
POLICY_BYTES = _layout.field("ejected").offset
_words = struct.Struct(f"={POLICY_BYTES // 8}Q")
_read_ejected = _layout.reader("ejected")
_read_flags = _layout.reader("flags")


class PolicyElement(NamedTuple):
    """A policy as it stands in the map; `most` endpoints may be ejected at a time."""

    policy: Policy = Policy()
    most: int = 0

    @property
    def words(self) -> tuple[int, ...]:
        """What the agent writes of the element, in words of 64 bits."""
        p = self.policy
        data = _pack(
            _WATCH if p.watch else 0, p.max_connections, p.room, p.streak, p.percent, p.volume,
            p.shortest, p.longest, p.trial, self.most,
        )  # fmt: skip
        return _words.unpack_from(data)

    @classmethod
    def of_sets(cls, policy: Policy, sets: Iterable[int]) -> PolicyElement:
        """`sets`: how many endpoints can be drawn of each set of the owner. What has but one passes
        over none."""
        return cls(policy, most_of(policy.most_percent, [count for count in sets if count > 1]))

    def __str__(self) -> str:
        known = {**asdict(self.policy), "most": self.most}
        known.pop("most_percent")
        return ", ".join(f"{name} {value}" for name, value in known.items() if value) or "none"

    @classmethod
    def of(cls, data: bytes) -> PolicyElement:
        """From an element of the map. The share of a set that `most` was made from is not in it."""
        flags, *numbers, most = _read(data)
        return cls(Policy(bool(flags & _WATCH), *numbers), most)


def ejected_of(data: bytes) -> int:
    """How many endpoints are ejected now, or would be, by an element of the map."""
    return int(_read_ejected(data)[0])


def ejected_in(memory: bytes | memoryview, stride: int, entries: int) -> int:
    """The same, summed over all elements of the map whose endpoints are watched: where that was
    turned off the programs go on to count who was ejected before, until a connect succeeds."""
    with memoryview(memory)[: stride * entries].cast("Q") as words:
        counts = words[POLICY_BYTES // 8 :: stride // 8].tolist()
    return sum(
        count
        for owner, count in enumerate(counts)
        if count and _read_flags(memory, owner * stride)[0] & _WATCH
    )


NO_POLICY = PolicyElement()


def algorithm_of(entry: Entry) -> int:
    """service.algorithm: what the entry asks for, without what can make no difference to it."""
    algorithm = entry.algorithm & ALGORITHM_MASK
    if not entry.endpoints:
        return algorithm
    if normal(entry.weights):
        algorithm |= WEIGHTED
    if entry.policy is None:
        return algorithm
    algorithm |= POLICY
    # Where there is nothing else to turn to, nothing is passed over.
    if choices(entry.endpoints, entry.weights) > 1:
        algorithm |= entry.algorithm & AVOID
    if algorithm & WEIGHTED:
        algorithm |= entry.algorithm & ZONE
    return algorithm


def choices(endpoints: Sequence[Backend], weights: Sequence[int]) -> int:
    """How many of these endpoints can be drawn."""
    return sum(map(bool, normal(weights))) or len(endpoints)


def most_of(percent: int, sets: Collection[int]) -> int:
    """How many endpoints of a service port may be ejected, by how many can be drawn of each of its
    sets: at least one if there are more, and never all of any set."""
    if not percent or not sets:
        return 0
    return max(0, min(max(1, max(sets) * percent // 100), min(sets) - 1))
