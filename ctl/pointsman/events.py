"""What sources tell the agent: plain values, put into its queue."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.objects import Object, Ref


@dataclass(frozen=True, slots=True)
class Problem:
    """Something an operator must mend, in one sentence each: what, where, how.

    `where` is a file or an API path, `object` "Service ns/name" or "", `field` a path such as
    "spec.ports[0].port" or "". `severity` is "error" (it is not in force, or only its last good
    version is) or "warning" (it is in force, but probably not what was meant). `reason` is that of
    the Kubernetes Event, in CamelCase; "" for the general one of the severity.
    """

    message: str
    mend: str
    where: str = ""
    object: str = ""
    field: str = ""
    severity: str = "error"
    reason: str = ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.object, self.field) if part)
        return f"{place}: {self.message}; {self.mend}" if place else f"{self.message}; {self.mend}"


@dataclass(frozen=True, slots=True)
class Listed:
    """The complete state of the source. Replaces everything known before, in one step."""

    objects: tuple[Object, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """What changed since, in one step: objects added or replaced, and objects that are gone."""

    objects: tuple[Object, ...] = ()
    deleted: tuple[Ref, ...] = ()


@dataclass(frozen=True, slots=True)
class Problems:
    """Everything the source finds wrong now. Replaces the list it gave before."""

    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Reach:
    """Whether the API server answers: at which URL, since when (seconds since the epoch), and what
    it, or the way there, says instead; "" while all watches run."""

    server: str
    since: float
    error: str = ""


Event = Listed | Changed | Problems | Reach
