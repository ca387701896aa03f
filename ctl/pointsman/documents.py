"""The objects in a manifest file, and what is wrong with them: bytes in, values out. Pure.

A `ManifestFile` holds what one file says: typed objects that passed `validate`, and Problems that
name file, object, field and mend. What Kubernetes has and Pointsman does not read is passed over.
"""

from __future__ import annotations

import codecs
import difflib
import re
from dataclasses import dataclass, field, replace

import msgspec

from pointsman.events import Problem
from pointsman.names import show
from pointsman.objects import KINDS, Object, Ref
from pointsman.validate import validate
from pointsman.yamlreader import Refused, json_documents, yaml_documents

_API_VERSIONS = dict.fromkeys(KINDS, "v1") | {
    "EndpointSlice": "discovery.k8s.io/v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
_CLUSTER_SCOPED = ("Node", "Namespace", "ServiceCIDR")
# All of core/v1: in other groups anyone may define kinds.
_CORE_KINDS = frozenset((
    "Binding", "ComponentStatus", "ConfigMap", "Endpoints", "Event", "LimitRange", "List",
    "Namespace", "Node", "PersistentVolume", "PersistentVolumeClaim", "Pod", "PodTemplate",
    "ReplicationController", "ResourceQuota", "Secret", "Service", "ServiceAccount",
))  # fmt: skip
# Kubernetes decodes a null in these as "", and leaves a null out everywhere else.
_TEXT_MAPS = frozenset(("labels", "annotations", "selector"))


@dataclass(slots=True)
class ManifestFile:
    """What one file said when it was last read."""

    where: str
    signature: tuple[int, ...] | None = None
    objects: dict[Ref, Object] = field(default_factory=dict)
    #: Named in it, but bad: their last good version is to stay in force.
    held: set[Ref] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    #: False if a part could not be read, so that it may name anything it named before.
    whole: bool = True
    #: Each text once, while the file is read: a thousand endpoints name few nodes and namespaces.
    _texts: dict[str, str] = field(default_factory=dict)

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
        documents = json_documents if self.where.endswith(".json") else yaml_documents
        for number, document in enumerate(documents(data), 1):
            self._add(document, f"document {number}")
        self._texts.clear()
        return None

    def lose(self, message: str, mend: str, name: str = "") -> None:
        """A problem with something that may be any object, or all of them."""
        self.whole = False
        self.problems.append(Problem(message, mend, self.where, field=name))

    def _add(self, document: object, place: str) -> None:
        if document is None:
            return None
        if isinstance(document, Refused):
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
        obj, problems = _decode(document, self._texts)
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


def _decode(
    document: dict[str, object], texts: dict[str, str]
) -> tuple[Object | None, list[Problem]]:
    """The typed object, None if it must not enter, and what is wrong with it."""
    kind, version = str(document["kind"]), document["apiVersion"]
    if version != _API_VERSIONS[kind]:
        message, mend = (
            f"{show(version)} has no {kind} that is read",
            f"write {_API_VERSIONS[kind]}",
        )
        return None, [Problem(message, mend, field="apiVersion")]
    cleaned = clean(document, texts)
    try:
        obj: Object = msgspec.convert(cleaned, KINDS[kind])
    except msgspec.ValidationError as error:
        name, message, mend = explain(error, cleaned)
        return None, [Problem(message, mend, field=name)]
    problems = validate(obj)
    bad = any(problem.severity == "error" for problem in problems)
    return None if bad else obj, problems


def _ref(document: dict[str, object]) -> Ref | None:
    """What a document names, as far as that can be told from a bad one."""
    metadata = document.get("metadata")
    if isinstance(metadata, dict):
        kind, name = str(document["kind"]), metadata.get("name")
        namespace = metadata.get("namespace") or "default"
        if kind in _CLUSTER_SCOPED:
            namespace = ""
        if isinstance(name, str) and name and isinstance(namespace, str):
            return Ref(kind, namespace, name)
    return None


def clean(value: object, texts: dict[str, str], in_text_map: bool = False) -> object:
    """Without nulls, and with equal texts as one object."""
    if isinstance(value, str):
        return texts.setdefault(value, value)
    if isinstance(value, dict):
        if in_text_map:
            return {
                texts.setdefault(key, key): "" if item is None else clean(item, texts)
                for key, item in value.items()
            }
        return {
            key: clean(item, texts, key in _TEXT_MAPS)
            for key, item in value.items()
            # Kubernetes takes an empty namespace for none, too.
            if item is not None and (key, item) != ("namespace", "")
        }
    return [clean(item, texts) for item in value] if isinstance(value, list) else value


_TYPES = {
    "str": ("text", "write text"),
    "int": ("a whole number", "write a whole number"),
    "int | str | null": ("a port", "write a port number or a port name"),
    "float": ("a number", "write a number"),
    "bool": ("true or false", "write true or false"),
    "array": ("a list", "write a list, each item after '- '"),
    "object": ("a mapping", "write a mapping of 'name: value'"),
}


def explain(error: msgspec.ValidationError, document: object) -> tuple[str, str, str]:
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
