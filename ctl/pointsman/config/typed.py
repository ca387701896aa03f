"""A document against a table of paths and types: every fault is named, not only the first. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

import msgspec

from pointsman.documents import explain
from pointsman.events import Problem
from pointsman.names import show


class Duration:
    """In a table: Go's duration as text, such as "15m0s". Comes out as seconds (float)."""


class DurationOrNanoseconds:
    """The same, or a whole number of nanoseconds, as Kubernetes' TimeOrMetaDuration."""


class Found(NamedTuple):
    """`values` by path, without nulls; `unknown` has (path, the known path it may stand for)."""

    values: dict[str, Any]
    unknown: list[tuple[str, str]]
    faults: list[Problem]


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_UNITS["h"] = 3600.0
_PART = r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"[-+]?(0|({_PART})+)")
_MAPPING = "write a mapping of 'name: value'"


def seconds(text: str) -> float:
    """Go's time.ParseDuration. Raises ValueError."""
    if len(text) > 100 or not _DURATION.fullmatch(text):
        raise ValueError(f"{show(text)} is no duration")
    total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, text))
    return -total if text.startswith("-") else total


def convert(value: object, wanted: Any, path: str) -> Any:
    """`value` as the type `wanted`. Returns a Problem that names the field if it is none."""
    if get_origin(wanted) is dict and isinstance(value, dict):
        items = {
            key: convert(item, get_args(wanted)[1], f"{path}.{key}") for key, item in value.items()
        }
        return next((each for each in items.values() if isinstance(each, Problem)), items)
    if wanted is DurationOrNanoseconds and isinstance(value, int) and not isinstance(value, bool):
        return float(value) / 1e9
    if wanted in (Duration, DurationOrNanoseconds):
        try:
            return seconds(value if isinstance(value, str) else "")
        except ValueError:
            message = f"expected a duration, got {show(value)}"
            return Problem(message, "write one such as 30s or 15m0s", field=path)
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        name, message, mend = explain(error, value)
        return Problem(message, mend, field=path + ("" if name[:1] in ("", "[") else ".") + name)


def flatten(document: Mapping[str, object], types: Mapping[str, Any]) -> Found:
    """The fields of a document by path, such as "conntrack.min". A null is as if left out."""
    sections = {path[:i] for path in types for i, letter in enumerate(path) if letter == "."}
    found = Found({}, [], [])
    for path, value in _leaves(document, "", sections):
        if path not in types and path not in sections:
            found.unknown.append((path, _nearest(path, types, sections)))
        elif value is None:
            continue
        elif path in sections:
            message = f"expected a mapping, got {show(value)}"
            found.faults.append(Problem(message, _MAPPING, field=path))
        elif isinstance(converted := convert(value, types[path], path), Problem):
            found.faults.append(converted)
        else:
            found.values[path] = converted
    return found


def _leaves(
    document: Mapping[str, object], prefix: str, sections: Iterable[str]
) -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        # A dot in a key is none between section and field.
        path = prefix + (f"[{key}]" if "." in key else key)
        if path in sections and isinstance(value, dict):
            yield from _leaves(value, f"{path}.", sections)
        else:
            yield path, value


def _nearest(path: str, types: Iterable[str], sections: Iterable[str]) -> str:
    """The known path that an unknown one may stand for, or ""."""
    known = {*types, *sections}
    parent, _, name = path.rpartition(".")
    elsewhere = [each for each in known if each.rpartition(".")[2].lower() == name.lower()]
    if elsewhere:
        return " or ".join(sorted(elsewhere))
    parts = ((each.rpartition("."), each) for each in known)
    beside = {last.lower(): each for (above, _, last), each in parts if above == parent}
    close = difflib.get_close_matches(name.lower()[:200], beside, 1)
    return beside[close[0]] if close else ""
