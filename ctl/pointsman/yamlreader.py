"""YAML and JSON as kubectl reads them: bytes in, the value of each document out. Pure.

Nothing that a file may hold takes long or raises: what can't be read comes out as a Refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml

from pointsman.names import show

MAX_DEPTH = 64
MAX_ALIASED = 100_000


class Refused(Exception):
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


class OverLimit(Refused):
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
            raise Refused("the document ends too soon", "complete it")
        elif depth >= MAX_DEPTH:
            message = f"{_line(event.start_mark)}more than {MAX_DEPTH} levels deep"
            raise OverLimit(message, "make it flatter")
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
            raise OverLimit(message, "write the values out")
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

    def _refuse(self, event: yaml.NodeEvent, message: str, mend: str) -> Refused:
        return Refused(f"{_line(event.start_mark)}{message}", mend)


def _line(mark: Any) -> str:  # libyaml's mark is not the type that PyYAML declares
    return f"line {mark.line + 1}: " if mark else ""


def yaml_documents(data: bytes) -> Iterator[object]:
    """Each document's value, or a Refused. After malformed YAML there are no more documents."""
    parser = yaml.CSafeLoader(data)
    try:
        while parser.check_event():
            if isinstance(parser.get_event(), yaml.DocumentStartEvent):
                try:
                    yield _Composer(parser).value(parser.get_event())
                except Refused as refused:
                    yield refused
                    if isinstance(refused, OverLimit):
                        return
                    while not isinstance(parser.get_event(), yaml.DocumentEndEvent):
                        pass
    except yaml.MarkedYAMLError as error:
        message = f"{_line(error.problem_mark)}malformed YAML: {error.problem}"
        yield Refused(message, "mend the YAML there")
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        yield Refused(f"malformed YAML: {text}", "remove the characters that are no text")


def json_documents(data: bytes) -> Iterator[object]:
    try:
        yield msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        yield Refused(f"malformed JSON: {error}", "mend the JSON there")
