"""docs/configuration.md says what the tables in the code say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pointsman.cli.up import up
from pointsman.config.kubeproxyfields import FIELDS, Field, Same, Sets
from pointsman.config.own import KEYS
from pointsman.config.reload import KEYS as SETTINGS
from pointsman.config.reload import LIVE

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
_TYPES = {str: "text", bool: "true or false", int: "whole number", list[str]: "list of texts"}
_OPTIONS = {param.name: max(param.opts, key=len) for param in up.params}


def table(header: str) -> list[list[str]]:
    """The cells of the rows below a header."""
    lines = PAGE.partition(f"\n| {header}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_keys_of_our_own_file() -> None:
    documented = [(key, what, option) for key, what, option in table("key | type | option |")]
    expected = [
        (
            f"`{key.path}`",
            _TYPES[key.type] + (", or `off`" if key.off else ""),
            f"`{_OPTIONS[key.option]}`",
        )
        for key in KEYS
    ]
    assert [row for row in documented if row[0] != "`kubernetes`"] == expected


def effects() -> dict[str, str]:
    return {
        path: what
        for paths, what in table("field | what becomes of it |")
        for path in re.findall("`([^`]+)`", paths)
    }


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_what_becomes_of_each_field_of_kube_proxy(field: Field) -> None:
    said = effects()[field.path]
    if isinstance(field.effect, Sets):
        assert said.startswith(f"`{_OPTIONS[field.effect.option]}`")
    else:
        verb = "needs nothing" if isinstance(field.effect, Same) else "has no effect"
        assert said.startswith(f"{verb}: ")


def test_no_field_is_documented_that_is_not_in_the_table() -> None:
    assert effects().keys() == {field.path for field in FIELDS}


def test_what_takes_effect_at_once() -> None:
    said = PAGE.partition("- **At once**")[2].partition("- **At the next start**")[0]
    live = {key for name in LIVE for key in SETTINGS[name].split(", ")}
    assert set(re.findall("`([^`]+)`", said)) - {"manifests"} == live
