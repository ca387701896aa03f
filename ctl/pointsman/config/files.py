"""A configuration file of any of the kinds that are read: bytes in, a Configuration out. Pure."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from pointsman.config import kubeproxy, own
from pointsman.config.configuration import BadConfiguration, Configuration
from pointsman.events import Problem
from pointsman.names import show
from pointsman.yamlreader import Refused, yaml_documents

#: In a ConfigMap, or in the directory where one is mounted; the second is kubeadm's.
NAMES = ("config.yaml", "config.conf")


class _Kind(NamedTuple):
    api_version: str
    read: Callable[[Mapping[str, object]], Configuration]


_KINDS = {
    own.KIND: _Kind(own.API_VERSION, own.read),
    kubeproxy.KIND: _Kind(kubeproxy.API_VERSION, kubeproxy.read),
}
_MEND = f"write kind: {own.KIND} and apiVersion: {own.API_VERSION}, or name kube-proxy's own file"


def read(data: bytes, where: str) -> Configuration:
    """What a file says; `where` names it in every problem.

    The file holds one PointsmanConfiguration, KubeProxyConfiguration, or ConfigMap that has one of
    these in its data. Raises BadConfiguration.
    """
    try:
        found = _read(data, in_config_map=False)
    except BadConfiguration as bad:
        raise BadConfiguration(*(replace(each, where=where) for each in bad.problems)) from None
    return replace(found, problems=tuple(replace(each, where=where) for each in found.problems))


def choose(names: Collection[str]) -> str:
    """Which of a directory's files, or of a ConfigMap's keys, is the configuration.

    Raises BadConfiguration.
    """
    shown = sorted(name for name in names if not name.startswith("."))
    for name in NAMES:
        if name in shown:
            return name
    if len(shown) == 1:
        return shown[0]
    there = f"there are {show(', '.join(shown))}" if shown else "there is none"
    message = f"which file is the configuration is not clear: {there}"
    raise BadConfiguration(Problem(message, f"name it {' or '.join(NAMES)}"))


def _read(data: bytes, in_config_map: bool) -> Configuration:
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        if "\0" in data.decode():
            raise BadConfiguration(Problem("it is a binary file", "write YAML as UTF-8 text"))
    except UnicodeDecodeError as error:
        mend = "save it as UTF-8 text"
        raise BadConfiguration(Problem(f"byte {error.start} is not UTF-8", mend)) from None
    document, passed_over = _only(list(yaml_documents(data)), in_config_map)
    kind, version = str(document["kind"]), document.get("apiVersion")
    if kind == "ConfigMap" and not in_config_map:
        found = _config_map(document)
    else:
        if version != _KINDS[kind].api_version:
            message = f"{kind} of {show(version)} is not read"
            mend = f"write {_KINDS[kind].api_version}"
            raise BadConfiguration(Problem(message, mend, field="apiVersion"))
        found = _KINDS[kind].read(document)
    return replace(found, problems=(*passed_over, *found.problems))


def _only(
    documents: list[object], in_config_map: bool
) -> tuple[dict[str, object], tuple[Problem, ...]]:
    """The one document that is of a kind that is read, and a warning for each other one."""
    known = [*_KINDS, *(() if in_config_map else ("ConfigMap",))]
    chosen: dict[str, object] | None = None
    others = []
    for number, document in enumerate(documents, 1):
        if isinstance(document, Refused):
            raise BadConfiguration(Problem(document.message, document.mend))
        if document is None:
            continue
        kind = document.get("kind") if isinstance(document, dict) else None
        if not isinstance(document, dict) or kind not in known:
            others.append((number, kind))
        elif chosen is not None:
            message = f"document {number} is a second configuration"
            raise BadConfiguration(Problem(message, "delete one of the two", field="kind"))
        else:
            chosen = document
    if chosen is None:
        raise BadConfiguration(_nothing(others, known))
    mend = "delete it from this file"
    return chosen, tuple(
        Problem(f"document {number} is passed over: {_kind(kind)}", mend, severity="warning")
        for number, kind in others
    )


def _nothing(others: list[tuple[int, object]], known: list[str]) -> Problem:
    if not others:
        return Problem("it is empty", _MEND)
    number, kind = others[0]
    close = difflib.get_close_matches(kind[:80], known, 1) if isinstance(kind, str) else []
    message = f"document {number} is no configuration: {_kind(kind)}"
    return Problem(message, f"write {close[0]}" if close else _MEND, field="kind")


def _kind(kind: object) -> str:
    return "it has no kind" if kind is None else f"kind {show(kind)}"


def _config_map(document: Mapping[str, object]) -> Configuration:
    name = "ConfigMap"
    if isinstance(metadata := document.get("metadata"), dict):
        parts = [metadata.get("namespace"), metadata.get("name")]
        name = f"ConfigMap {'/'.join(part for part in parts if isinstance(part, str))}".strip()
    data = document.get("data")
    if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
        mend = "write the configuration as text under a key, after '|'"
        raise BadConfiguration(Problem("expected texts by name", mend, object=name, field="data"))
    try:
        key = choose(data)
    except BadConfiguration as bad:
        raise BadConfiguration(
            *(replace(each, object=name, field="data") for each in bad.problems)
        ) from None
    place = f"{name}, {key}"
    try:
        found = _read(data[key].encode(errors="replace"), in_config_map=True)
    except BadConfiguration as bad:
        raise BadConfiguration(*(replace(each, object=place) for each in bad.problems)) from None
    return replace(found, problems=tuple(replace(each, object=place) for each in found.problems))
