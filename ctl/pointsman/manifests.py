"""The manifests source: a directory of the files that `kubectl apply` takes, watched.

Three jobs, from the bytes up: `_documents` reads YAML within limits, `_File` makes objects of the
documents, `ManifestSource` keeps what all files say together and watches the directory. A bad file
or object never takes anything away: the last good version of each object stays in force.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import yaml
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from pointsman.events import Changed, Event, Listed, Problem, Problems
from pointsman.objects import KINDS, Object, Ref
from pointsman.validate import show, validate

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_ALIASED = 100_000

_API_VERSIONS = {"Service": "v1", "Pod": "v1", "EndpointSlice": "discovery.k8s.io/v1"}
# All of core/v1: in other groups anyone may define kinds.
_CORE_KINDS = frozenset((
    "Binding", "ComponentStatus", "ConfigMap", "Endpoints", "Event", "LimitRange", "List",
    "Namespace", "Node", "PersistentVolume", "PersistentVolumeClaim", "Pod", "PodTemplate",
    "ReplicationController", "ResourceQuota", "Secret", "Service", "ServiceAccount",
))  # fmt: skip
# Kubernetes decodes a null in these as "", and leaves a null out everywhere else.
_TEXT_MAPS = frozenset(("labels", "annotations", "selector"))


class _Refused(Exception):
    """A document that cannot be read: what is wrong, what to do."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.message, self.mend = message, mend


_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLS = {
    form: value
    for value, words in ((True, ("y", "yes", "on", "true")), (False, ("n", "no", "off", "false")))
    for word in words
    for form in (word, word.capitalize(), word.upper())
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,30}|0x[0-9a-fA-F]{1,16}|0o?[0-7]{1,22}|0b[01]{1,64})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class _OverLimit(_Refused):
    """The rest of the file is not looked at: libyaml's time is quadratic in the depth."""


def _plain(text: str) -> object:
    """An unquoted scalar as kubectl's YAML reader resolves it: dates stay text."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        digits = text.lstrip("-+")
        octal = len(digits) > 1 and digits.isdecimal() and digits[0] == "0"
        number = int(digits, 8) if octal else int(digits, 0)
        return -number if text[0] == "-" else number
    return float(text) if _FLOAT.fullmatch(text) else text


class _Composer:
    """Values out of libyaml's events.

    PyYAML's own constructor takes five times as long, and knows no limit on depth or aliases.
    """

    def __init__(self, parser: yaml.CSafeLoader) -> None:
        self._parser = parser
        self._anchors: dict[str, tuple[object, int]] = {}
        self._nodes = 0
        self._aliased = 0

    def value(self, event: yaml.Event | None, depth: int = 0) -> object:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self._nodes
        self._nodes += 1
        value: object
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif not isinstance(event, yaml.CollectionStartEvent):
            raise _Refused("the document ends too soon", "complete it")
        elif depth >= MAX_DEPTH:
            message = f"{_line(event.start_mark)}more than {MAX_DEPTH} levels deep"
            raise _OverLimit(message, "make it flatter")
        elif event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self._refuse(event, f"tag {show(event.tag)} is unknown", "remove the tag")
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(depth + 1)
        else:
            value = [self.value(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._nodes - before
        return value

    def _until(self, end: type[yaml.Event]) -> Iterator[Any]:
        while (event := self._parser.get_event()) and not isinstance(event, end):
            yield event

    def _alias(self, event: yaml.AliasEvent) -> object:
        if event.anchor not in self._anchors:
            raise self._refuse(event, f"no anchor &{event.anchor} before it", "add the anchor")
        value, nodes = self._anchors[event.anchor]
        self._nodes += nodes
        self._aliased += nodes
        if self._aliased > MAX_ALIASED:
            message = f"{_line(event.start_mark)}aliases stand for over {MAX_ALIASED} values"
            raise _OverLimit(message, "write the values out")
        return value

    def _mapping(self, depth: int) -> dict[str, object]:
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        for event in self._until(yaml.MappingEndEvent):
            key = self.value(event, depth)
            value = self.value(self._parser.get_event(), depth)
            if key == "<<" and isinstance(event, yaml.ScalarEvent) and not event.style:
                for source in value if isinstance(value, list) else [value]:
                    if not isinstance(source, dict):
                        raise self._refuse(event, "<< merges no mapping", "write << : *anchor")
                    merged = source | merged
                continue
            if isinstance(key, (dict, list)) or key is None:
                raise self._refuse(event, "a key is no text", "write a name before the ':'")
            # JSON has text keys only, so kubectl turns 1: and true: into that.
            name = key if isinstance(key, str) else str(key).lower()
            if name in own:
                raise self._refuse(event, f"{show(name)} is there twice", "delete one of the two")
            own[name] = value
        return merged | own if merged else own

    def _scalar(self, event: yaml.ScalarEvent) -> object:
        tag, text = event.tag, event.value
        if tag is None or tag == "!":
            return _plain(text) if event.implicit[0] else text
        if tag == "tag:yaml.org,2002:str":
            return text
        if tag in [f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")]:
            return _plain(text)
        raise self._refuse(event, f"tag {show(tag)} is unknown", "remove the tag")

    def _refuse(self, event: yaml.NodeEvent, message: str, mend: str) -> _Refused:
        return _Refused(f"{_line(event.start_mark)}{message}", mend)


def _line(mark: Any) -> str:  # libyaml's mark is not the type that PyYAML declares
    return f"line {mark.line + 1}: " if mark else ""


def _documents(data: bytes) -> Iterator[object]:
    """Each document's value, or a _Refused. After malformed YAML there are no more documents."""
    parser = yaml.CSafeLoader(data)
    try:
        while parser.check_event():
            if isinstance(parser.get_event(), yaml.DocumentStartEvent):
                try:
                    yield _Composer(parser).value(parser.get_event())
                except _Refused as refused:
                    yield refused
                    if isinstance(refused, _OverLimit):
                        return
                    while not isinstance(parser.get_event(), yaml.DocumentEndEvent):
                        pass
    except yaml.MarkedYAMLError as error:
        message = f"{_line(error.problem_mark)}malformed YAML: {error.problem}"
        yield _Refused(message, "mend the YAML there")
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        yield _Refused(f"malformed YAML: {text}", "remove the characters that are no text")


def _json_documents(data: bytes) -> Iterator[object]:
    try:
        yield msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        yield _Refused(f"malformed JSON: {error}", "mend the JSON there")


def _without_nulls(value: object, texts: bool = False) -> object:
    if isinstance(value, dict):
        if texts:
            return {key: "" if item is None else item for key, item in value.items()}
        return {
            key: _without_nulls(item, key in _TEXT_MAPS)
            for key, item in value.items()
            # Kubernetes takes an empty namespace for none, too.
            if item is not None and (key, item) != ("namespace", "")
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_TYPES = {
    "str": ("text", "write text"),
    "int": ("a whole number", "write a whole number"),
    "int | str | null": ("a port", "write a port number or a port name"),
    "bool": ("true or false", "write true or false"),
    "array": ("a list", "write a list, each item after '- '"),
    "object": ("a mapping", "write a mapping of 'name: value'"),
}


def _explain(error: msgspec.ValidationError, document: object) -> tuple[str, str, str]:
    """Field, message and mend of an error such as "Expected `int`, got `str` - at `$.spec.x`"."""
    text, _, path = str(error).partition(" - at `$")
    name, value = "", document
    for part in re.findall(r"\.[^.\[`]+|\[[^\]]+\]", path):
        if isinstance(value, list):
            value = value[int(part[1:-1])]
        elif isinstance(value, dict):
            if part == "[...]":  # msgspec does not say which key, but all it wants there is text
                part = f"[{next(k for k, v in value.items() if not isinstance(v, str))}]"
            value = value.get(part.strip(".[]") if part[0] == "." else part[1:-1])
        name += part
    name = name.removeprefix(".")
    if missing := re.fullmatch(r"Object missing required field `(.+)`", text):
        return f"{name}.{missing[1]}".removeprefix("."), "it is missing", f"add {missing[1]}"
    shown = {dict: "a mapping", list: "a list", type(None): "null", bool: show(value).lower()}
    got = shown.get(type(value), show(value))
    expected = re.fullmatch(r"Expected `(.+)`, got `.+`", text)
    if expected is None:
        mend = "write it as 2024-01-31T12:00:00Z" if "datetime" in text else "mend the value"
        return name, f"{got}: {text}", mend
    types = expected[1]
    what, mend = (
        _TYPES.get(types) or _TYPES.get(types.removesuffix(" | null")) or (types, f"write {types}")
    )
    if what == "a whole number" and isinstance(value, str) and value.isdecimal():
        mend = "write it without quotes"
    elif what == "text" and isinstance(value, (bool, int, float)):
        mend = "quote it"
    return name, f"expected {what}, got {got}", mend


@dataclass(slots=True)
class _File:
    """What one file said when it was last read."""

    where: str
    signature: tuple[int, ...] | None = None
    objects: dict[Ref, Object] = field(default_factory=dict)
    #: Named in it, but bad: their last good version is to stay in force.
    held: set[Ref] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    #: False if a part could not be read, so that it may name anything it named before.
    whole: bool = True

    @property
    def refs(self) -> set[Ref]:
        return self.objects.keys() | self.held

    def read(self, data: bytes) -> None:
        data = data.removeprefix(codecs.BOM_UTF8)
        if b"\0" in data:
            return self.lose("it is a binary file", "write YAML or JSON as UTF-8 text")
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return self.lose(f"byte {error.start} is not UTF-8", "save it as UTF-8 text")
        documents = _json_documents if self.where.endswith(".json") else _documents
        for number, document in enumerate(documents(data), 1):
            self._add(document, f"document {number}")
        return None

    def lose(self, message: str, mend: str, name: str = "") -> None:
        """A problem with something that may be any object, or all of them."""
        self.whole = False
        self.problems.append(Problem(message, mend, self.where, field=name))

    def _add(self, document: object, place: str) -> None:
        if document is None:
            return None
        if isinstance(document, _Refused):
            self.lose(document.message, document.mend)
        elif not isinstance(document, dict):
            self.lose(f"{place} is no object", "write apiVersion, kind and metadata")
        else:
            for name in ("kind", "apiVersion"):
                if not (isinstance(text := document.get(name), str) and text):
                    return self.lose(f"{place} has no {name}", f"add {name}", name)
            self._add_kind(document, place)
        return None

    def _add_kind(self, document: dict[str, object], place: str) -> None:
        kind, version = str(document["kind"]), str(document["apiVersion"])
        group = version.rpartition("/")[0]
        item_kind = kind.removesuffix("List")
        if kind != item_kind and item_kind in ("", *KINDS):
            self._add_list(document, place, item_kind)
        elif kind in KINDS:
            # A group with a dot is someone else's, which may have a Service of its own.
            if not group or "." not in group or group.endswith("k8s.io"):
                self._add_object(document, place)
        elif kind == "Endpoints" and not group:
            name = _ref(document)
            message = "Endpoints are not read"
            mend = "write an EndpointSlice with the label kubernetes.io/service-name"
            self._problem(Problem(message, mend, field="kind", severity="warning"), name)
        elif not group and item_kind not in _CORE_KINDS:
            close = difflib.get_close_matches(kind.title(), _CORE_KINDS | KINDS.keys(), 1)
            mend = f"write {close[0]}" if close else "mend kind or apiVersion"
            self.lose(f"{place}: kind {show(kind)} is unknown in {show(version)}", mend, "kind")

    def _add_list(self, document: dict[str, object], place: str, item_kind: str) -> None:
        items = document.get("items")
        if not isinstance(items, list | None):
            return self.lose(f"{place}: items is no list", "write a list", "items")
        for i, item in enumerate(items or []):
            if isinstance(item, dict) and item_kind:
                # The API server leaves both out of the items of a typed list.
                item = {"kind": item_kind, "apiVersion": document["apiVersion"]} | item
            self._add(item, f"{place}, items[{i}]")
        return None

    def _add_object(self, document: dict[str, object], place: str) -> None:
        ref = _ref(document)
        if ref and ref in self.refs:
            message = f"{place} defines it again"
            return self._problem(Problem(message, "delete one of the two"), ref)
        obj, problems = _decode(document)
        for problem in problems:
            self._problem(problem, ref)
        if ref is None:
            self.whole = False
        elif obj is None:
            self.held.add(ref)
        else:
            self.objects[ref] = obj
        return None

    def _problem(self, problem: Problem, ref: Ref | None) -> None:
        self.problems.append(replace(problem, where=self.where, object=str(ref) if ref else ""))


def _decode(document: dict[str, object]) -> tuple[Object | None, list[Problem]]:
    """The typed object, None if it must not enter, and what is wrong with it."""
    kind, version = str(document["kind"]), document["apiVersion"]
    if version != _API_VERSIONS[kind]:
        message, mend = (
            f"{show(version)} has no {kind} that is read",
            f"write {_API_VERSIONS[kind]}",
        )
        return None, [Problem(message, mend, field="apiVersion")]
    clean = _without_nulls(document)
    try:
        obj: Object = msgspec.convert(clean, KINDS[kind])
    except msgspec.ValidationError as error:
        name, message, mend = _explain(error, clean)
        return None, [Problem(message, mend, field=name)]
    problems = validate(obj)
    bad = any(problem.severity == "error" for problem in problems)
    return None if bad else obj, problems


def _ref(document: dict[str, object]) -> Ref | None:
    """What a document names, as far as that can be told from a bad one."""
    metadata = document.get("metadata")
    if isinstance(metadata, dict):
        name, namespace = metadata.get("name"), metadata.get("namespace") or "default"
        if isinstance(name, str) and name and isinstance(namespace, str):
            return Ref(str(document["kind"]), namespace, name)
    return None


class _Wake(FileSystemEventHandler):
    """Wakes the source on every change below the directory, and keeps the watch on it in place."""

    #: Opening and closing a file to read it are events too: our own reading must not wake us.
    CHANGES = frozenset(("created", "modified", "moved", "deleted", "closed"))

    def __init__(self, directory: Path, rescan: float) -> None:
        self.event = threading.Event()
        self.problem: Problem | None = None
        self._directory, self._rescan = directory, rescan
        self._observer: BaseObserver = Observer()
        self._watched: tuple[str, int, int] | None = None
        self._lost = False

    def __enter__(self) -> _Wake:
        self._observer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._observer.stop()
        self._observer.join()

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in self.CHANGES:
            return
        # An inode number can come back with a directory made anew, so it alone tells nothing.
        if event.event_type in ("deleted", "moved") and self._watched:
            self._lost = self._lost or os.fsdecode(event.src_path) == self._watched[0]
        self.event.set()

    def follow(self) -> bool:
        """Watches what stands at the directory's path now; True if that is not what it was."""
        now = None
        with contextlib.suppress(OSError):
            status = self._directory.stat()
            # inotify is told not to follow links, so it gets the directory behind them.
            now = str(self._directory.resolve()), status.st_dev, status.st_ino
        if now == self._watched and not self._lost:
            return False
        self._lost, self._watched, self.problem = False, now, None
        self._observer.unschedule_all()
        if now:
            try:
                self._observer.schedule(self, now[0], recursive=True)
            except OSError as error:
                message = f"it cannot be watched: {error.strerror}"
                mend = (
                    "raise sysctl fs.inotify.max_user_watches and max_user_instances;"
                    f" until then changes are seen within {self._rescan:.0f} s"
                )
                where = str(self._directory)
                self.problem = Problem(message, mend, where, severity="warning")
        return True


class ManifestSource:
    """The objects in a directory's manifests. `read` and `run` belong to one thread.

    `max_bytes` is the most a file may have. Changes are read once the directory has been quiet
    for `quiet` seconds (or has been busy for 20 times that), and everything is looked at again
    every `rescan` seconds, for file systems that tell no one about changes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = MAX_BYTES,
        quiet: float = 0.06,
        rescan: float = 30.0,
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._quiet = quiet
        self._rescan = rescan
        self._files: dict[str, _File] = {}
        #: The files that name an object, the one that was there first in front.
        self._claims: dict[Ref, list[str]] = {}
        #: Each object in force and the file it is from.
        self._in_force: dict[Ref, tuple[str, Object]] = {}
        self._faults: list[Problem] = []
        #: The directory itself could not be read the last time.
        self._blind = False

    def read(self) -> tuple[Listed, Problems]:
        """Reads what has changed since the last time (at first: all) and gives the whole state."""
        self._scan()
        objects = tuple(obj for _, (_, obj) in sorted(self._in_force.items()))
        return Listed(objects), Problems(tuple(self._problems()))

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None:
        """Puts Listed first, then Changed and Problems as they come, until `stop` is set.

        Problems is put only when the list differs from the last (at first: from none). A directory
        that is missing or unreadable is a Problem and says nothing about the objects: there is no
        Listed before it was read once, and later the last state stays. Notices `stop` within a
        quarter of a second.
        """
        with _Wake(self._directory, self._rescan) as wake:
            wake.follow()  # before the first reading, so that no change falls between the two
            listed, _ = self.read()
            known = not self._blind
            if known:
                put(listed)
            told: list[Problem] = []
            looked = time.monotonic()
            while not stop.is_set():
                problems = self._problems() + ([wake.problem] if wake.problem else [])
                if problems != told:
                    put(Problems(tuple(problems)))
                    told = problems
                woken = wake.event.wait(0.25)
                elsewhere = wake.follow()
                if woken or elsewhere or time.monotonic() - looked >= self._rescan:
                    self._settle(wake.event)
                    changed = self._scan()
                    if not known and not self._blind:
                        known = True
                        put(self.read()[0])
                    elif changed.objects or changed.deleted:
                        put(changed)
                    looked = time.monotonic()

    def _settle(self, event: threading.Event) -> None:
        """Waits for the end of a burst of events: half of a file would delete the other half."""
        end = time.monotonic() + 20 * self._quiet
        while True:
            event.clear()
            if not event.wait(self._quiet) or time.monotonic() > end:
                return

    def _scan(self) -> Changed:
        found, self._faults, unreadable = self._walk()
        self._blind = str(self._directory) in unreadable
        gone = [
            path
            for path in self._files.keys() - found.keys()
            if not any(Path(path).is_relative_to(place) for place in unreadable)
        ]
        touched: set[Ref] = set()
        for path in gone:
            touched |= self._replace(path, None)
        for path in sorted(found):
            before, status = self._files.get(path), found[path]
            if before is None or before.signature != _signature(status):
                touched |= self._replace(path, self._load(path, status))
        return self._settle_claims(touched)

    def _walk(self) -> tuple[dict[str, os.stat_result], list[Problem], list[str]]:
        """Manifests with their status, what cannot be read, and the paths of that."""
        found: dict[str, os.stat_result] = {}
        faults: list[Problem] = []
        unreadable: list[str] = []
        seen: set[tuple[int, int]] = set()
        todo = [str(self._directory)]
        while todo:
            path = todo.pop()
            try:
                status = os.stat(path)  # noqa: PTH116 - Path would double the time of a scan
                if not stat.S_ISDIR(status.st_mode) and len(seen):
                    found[path] = status
                    continue
                # Links may lead to where we are: each directory is read once.
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(path) as entries:
                    todo += sorted((e.path for e in entries if _concerns(e)), reverse=True)
            except FileNotFoundError:
                if not seen:
                    mend = "make it, or name another directory"
                    faults.append(Problem("the directory of manifests is missing", mend, path))
                    unreadable.append(path)
            except OSError as error:
                message = f"cannot be read: {error.strerror}"
                faults.append(Problem(message, "make it readable for this user", path))
                unreadable.append(path)
        return found, faults, unreadable

    def _load(self, path: str, status: os.stat_result) -> _File | None:
        """The file as it is now; None if it is gone."""
        # A file that was written just now may be written again within the clock's tick, with
        # nothing in its status to tell: do not take it for known.
        settled = time.time_ns() - status.st_mtime_ns > 100_000_000
        file = _File(path, _signature(status) if settled else None)
        limit = f"{self._max_bytes} bytes"
        if not stat.S_ISREG(status.st_mode):
            file.lose("it is no regular file", "write a file there")
        elif status.st_size > self._max_bytes:
            file.lose(f"it has {status.st_size} bytes", f"write files of at most {limit}")
        else:
            try:
                with Path(path).open("rb") as stream:
                    data = stream.read(self._max_bytes + 1)
            except FileNotFoundError:
                return None
            except OSError as error:
                file.lose(f"cannot be read: {error.strerror}", "make it readable for this user")
            else:
                if len(data) > self._max_bytes:
                    file.lose(f"it has more than {limit}", f"write files of at most {limit}")
                else:
                    file.read(data)
        return file

    def _replace(self, path: str, file: _File | None) -> set[Ref]:
        """Puts what a file says now in the place of what it said; gives the objects concerned."""
        old = self._files.pop(path, None)
        before = old.refs if old else set()
        after: set[Ref] = set()
        if file:
            if not file.whole:
                file.held |= before - file.objects.keys()
            after = file.refs
            self._files[path] = file
        for ref in before - after:
            self._claims[ref].remove(path)
            if not self._claims[ref]:
                del self._claims[ref]
        for ref in after - before:
            self._claims.setdefault(ref, []).append(path)
        return before | after

    def _settle_claims(self, touched: set[Ref]) -> Changed:
        objects, deleted = [], []
        for ref in sorted(touched):
            before, after = self._in_force.get(ref), self._choose(ref)
            if after is None:
                if self._in_force.pop(ref, None):
                    deleted.append(ref)
                continue
            self._in_force[ref] = after
            if before is None or before[1] != after[1]:
                objects.append(after[1])
        return Changed(tuple(objects), tuple(deleted))

    def _choose(self, ref: Ref) -> tuple[str, Object] | None:
        """The version of an object that is to be in force, and the file it is from."""
        current = self._in_force.get(ref)
        claims = self._claims.get(ref)
        for path in claims or ():
            if obj := self._files[path].objects.get(ref):
                return path, obj
            if current and current[0] == path:
                return current
        # Moved to a file where it is bad: that it was good elsewhere counts.
        return current if claims else None

    def _problems(self) -> list[Problem]:
        problems = list(self._faults)
        for path in sorted(self._files):
            problems += self._files[path].problems
        for ref in sorted(ref for ref, claims in self._claims.items() if len(claims) > 1):
            claims = self._claims[ref]
            owner = self._in_force[ref][0] if ref in self._in_force else claims[0]
            message = f"{owner} has it too, and had it first"
            mend = "delete one of the two"
            problems += [Problem(message, mend, p, str(ref)) for p in claims if p != owner]
        return problems


def _concerns(entry: os.DirEntry[str]) -> bool:
    """Hidden names are editors' files, and the ..data that a mounted ConfigMap links to."""
    if entry.name.startswith("."):
        return False
    if entry.name.endswith((".yaml", ".yml", ".json")):
        return True
    with contextlib.suppress(OSError):  # a link that leads to itself
        return entry.is_dir()
    return False


def _signature(status: os.stat_result) -> tuple[int, ...]:
    s = status
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
