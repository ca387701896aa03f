"""What a configuration file says, as values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pointsman.events import Problem


@dataclass(frozen=True, slots=True)
class Note:
    """A field that asks for nothing, and why: what it says is so anyway."""

    field: str
    why: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """One file's meaning, in terms of the options of `pointsman up`.

    `options` has the values by the name of click's parameter, as a person would write them: they
    are checked by the options themselves. `fields` names the field of the file that each is from.
    `problems` are warnings only.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    notes: tuple[Note, ...] = ()


class BadConfiguration(Exception):
    """A configuration that must not enter: at least one of its `problems` is an error."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems
