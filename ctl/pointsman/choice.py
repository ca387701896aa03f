"""The annotations by which a Service says how endpoints are chosen, and an endpoint what it weighs.
Pure; docs/services.md has the table.

An annotation with a value that can't be read never counts: `settle` puts the last good one in its
place, or none, before anything else looks at it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from pointsman import abi
from pointsman.context import Policy as Operator
from pointsman.events import Problem
from pointsman.names import show
from pointsman.objects import Ref
from pointsman.values import Policy

_ABI = abi.constants()
CHOICE_POLICY, CHOICE_AVOID = _ABI["CHOICE_POLICY"], _ABI["CHOICE_AVOID"]
_MASK = _ABI["ALGORITHM_MASK"]
MAX_WEIGHT, USUAL_WEIGHT = _ABI["MAX_WEIGHT"], 100
PREFIX = "pointsman.io/"
ALGORITHM = f"{PREFIX}algorithm"
EJECTION = f"{PREFIX}outlier-ejection"
SLOW_START = f"{PREFIX}slow-start"
MAX_CONNECTIONS = f"{PREFIX}max-connections"
ZONE_CONNECTIONS = f"{PREFIX}same-zone-connections"
DRAIN = f"{PREFIX}drain"
WEIGHT = f"{PREFIX}weight"

ALGORITHMS = {
    name.removeprefix("ALGORITHM_").replace("_", "-").lower(): number
    for name, number in abi.enumerators("algorithm").items()
    if name != "ALGORITHM_MASK"
}
EJECTIONS = ("off", "on", "observe")
_MOST = (1 << 31) - 1  # of connections
_DAY = 86400
_TIME = re.compile(r"([0-9]{1,5})|(?=[0-9])(?:([0-9]{1,5})h)?(?:([0-9]{1,5})m)?(?:([0-9]{1,5})s)?")
#: Connections a second. The programs remember MAX_DESTROYED of those that were ended.
_FASTEST = 1000
_RATE = re.compile(r"([0-9]{1,6})/([sm])")


class _Word(NamedTuple):
    """An annotation: `read` raises ValueError, `allowed` completes "write …"."""

    read: Callable[[str], Any]
    allowed: str


def _one_of(*names: str) -> _Word:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return _Word(read, f"{', '.join(names[:-1])} or {names[-1]}")


def _number(most: int) -> _Word:
    def read(text: str) -> int:
        # Ten digits hold them all; int() takes more than these.
        if not re.fullmatch("[0-9]{1,10}", text) or int(text) > most:
            raise ValueError(text)
        return int(text)

    return _Word(read, f"a whole number from 0 to {most}")


def _seconds(text: str) -> int:
    if not (found := _TIME.fullmatch(text)):
        raise ValueError(text)
    plain, hours, minutes, seconds = (int(each or 0) for each in found.groups())
    total = plain + 3600 * hours + 60 * minutes + seconds
    if total > _DAY:
        raise ValueError(text)
    return total


def _rate(text: str) -> float:
    found = _RATE.fullmatch(text)
    rate = int(found[1]) / (60 if found[2] == "m" else 1) if found else 0.0
    if not 0 < rate <= _FASTEST:
        raise ValueError(text)
    return rate


_OF_SERVICES = {
    ALGORITHM: _one_of(*ALGORITHMS),
    EJECTION: _one_of(*EJECTIONS),
    SLOW_START: _Word(_seconds, "seconds, or a duration such as 30s or 2m, up to 24h"),
    MAX_CONNECTIONS: _number(_MOST),
    ZONE_CONNECTIONS: _number(_MOST),
    DRAIN: _Word(_rate, f"a rate up to {_FASTEST}/s, such as 5/s or 20/m"),
}
_OF_ENDPOINTS = {WEIGHT: _number(MAX_WEIGHT)}
_WORDS: dict[str, dict[str, _Word]] = {
    "Service": _OF_SERVICES,
    "EndpointSlice": _OF_ENDPOINTS,
    "Pod": _OF_ENDPOINTS,
}
#: Theirs, but not ours to read.
_OTHERS = (f"{PREFIX}socket-lb",)


class Settled(NamedTuple):
    """The annotations that count, and what is wrong with those that were written."""

    annotations: dict[str, str]
    problems: tuple[Problem, ...]


def settle(ref: Ref, annotations: dict[str, str], before: Mapping[str, str]) -> Settled:
    """`before`: the annotations of this object that counted until now.

    The annotations themselves come back, not a copy, where all are in order.
    """
    if not any(name.startswith(PREFIX) for name in annotations):
        return Settled(annotations, ())
    words, settled, problems = _WORDS.get(ref.kind, {}), annotations, []
    for name, text in annotations.items():
        if not name.startswith(PREFIX) or name in _OTHERS:
            continue
        if (word := words.get(name)) is None:
            problems.append(_misplaced(ref, name, words))
        elif not _good(word, text):
            settled = {key: value for key, value in settled.items() if key != name}
            stays = "it counts as absent"
            if (known := before.get(name)) is not None and _good(word, known):
                settled[name] = known
                stays = f"{show(known)} stays in force"
            message = f"{show(text)} is not one of its values, so {stays}"
            problems.append(_problem(ref, name, message, f"write {word.allowed}"))
    return Settled(settled, tuple(problems))


def _good(word: _Word, text: str) -> bool:
    try:
        word.read(text)
    except ValueError:
        return False
    return True


def _misplaced(ref: Ref, name: str, words: Mapping[str, _Word]) -> Problem:
    if name in _OF_SERVICES or name in _OF_ENDPOINTS:
        place = "the Service" if name in _OF_SERVICES else "EndpointSlices or Pods"
        return _problem(ref, name, "it has no effect here", f"write it on {place}")
    # The prefix is theirs all: without it.
    names = {each.removeprefix(PREFIX): each for each in words}
    near = difflib.get_close_matches(name.removeprefix(PREFIX)[:80], names, 1)
    mend = f"write {names[near[0]]}" if near else "delete it"
    return _problem(ref, name, "there is no such annotation", mend)


def _problem(ref: Ref, name: str, message: str, mend: str) -> Problem:
    where = f"metadata.annotations[{name}]"
    return Problem(message, mend, "", str(ref), where, "warning", "AnnotationInvalid")


class Kept(NamedTuple):
    """The last good values of an object's annotations that are bad now. `uid` is "" where there is
    none: in manifests, and in what a version before this one saved."""

    uid: str
    annotations: dict[str, str]

    def for_uid(self, uid: str) -> dict[str, str]:
        """Those that an object of this uid goes on with: one that is made again does not."""
        return {} if uid and self.uid and uid != self.uid else self.annotations


def kept(written: Mapping[str, str], settled: Mapping[str, str]) -> dict[str, str]:
    """Of the annotations that count those that nobody writes any more: what `settle` must know of
    after a restart."""
    if written is settled:
        return {}
    return {name: text for name, text in settled.items() if written.get(name) != text}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a Service asks for. `algorithm` is one of ALGORITHM_… of abi.h and what `policy` adds of
    CHOICE_…; `slow_start` is in seconds, `drain` in connections a second; 0 is none."""

    algorithm: int
    policy: Policy | None
    slow_start: int
    drain: float


def choice_of(annotations: Mapping[str, str], operator: Operator) -> Choice:
    """From annotations that are settled, with the operator's defaults for what they don't say."""
    return _choice(tuple(annotations.get(name) for name in _OF_SERVICES), operator)


@lru_cache(maxsize=1 << 10)
def _choice(said: tuple[str | None, ...], operator: Operator) -> Choice:
    found = dict(zip(_OF_SERVICES, said, strict=True))

    def read(name: str, otherwise: Any) -> Any:
        text = found[name]
        try:
            return otherwise if text is None else _OF_SERVICES[name].read(text)
        except ValueError:  # nobody has settled it
            return otherwise

    ejection = read(EJECTION, operator.outlier_ejection)
    most, room = read(MAX_CONNECTIONS, 0), read(ZONE_CONNECTIONS, 0)
    algorithm = ALGORITHMS[read(ALGORITHM, operator.algorithm)]
    policy = None
    if ejection != "off" or most or room:
        policy = _policy(ejection != "off", most, room, operator)
        algorithm |= CHOICE_POLICY | (CHOICE_AVOID if ejection == "on" else 0)
    return Choice(algorithm, policy, read(SLOW_START, 0), read(DRAIN, 0.0))


def sticky(algorithm: int, affinity: int) -> str:
    """Why a client would come back to the endpoint that it had, "" if it would not. `affinity` is
    in seconds."""
    if affinity:
        return "sessionAffinity"
    return "algorithm maglev" if algorithm & _MASK == ALGORITHMS["maglev"] else ""


def _policy(watch: bool, most: int, room: int, operator: Operator) -> Policy:
    if not watch:
        return Policy(max_connections=most, room=room)
    numbers = operator.ejection
    shortest, longest, trial = (
        round(seconds * 1e9) for seconds in (numbers.shortest, numbers.longest, numbers.trial)
    )
    return Policy(
        watch=True,
        max_connections=most,
        room=room,
        streak=numbers.consecutive_failures,
        percent=numbers.failure_percent,
        volume=numbers.minimum_connects,
        shortest=shortest,
        longest=longest,
        trial=trial,
        most_percent=numbers.most_percent,
    )


def weight_of(annotations: Mapping[str, str]) -> int:
    """Of the endpoints of an EndpointSlice, or of a Pod: 0 to MAX_WEIGHT."""
    text = annotations.get(WEIGHT)
    try:
        return USUAL_WEIGHT if text is None else int(_OF_ENDPOINTS[WEIGHT].read(text))
    except ValueError:
        return USUAL_WEIGHT
