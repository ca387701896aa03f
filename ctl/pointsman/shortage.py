"""What does not fit in a map, and when it is worth another try. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pointsman.events import Problem
from pointsman.objects import Ref


@dataclass(slots=True)
class Shortage:
    """How many elements of one map objects would need that are not there."""

    lacking: dict[Ref, int] = field(default_factory=dict)
    freed: bool = False

    def add(self, ref: Ref, count: int) -> None:
        self.lacking[ref] = self.lacking.get(ref, 0) + count

    @property
    def waiting(self) -> bool:
        """Whether something that did not fit is worth another try."""
        return self.freed and bool(self.lacking)

    def again(self, available: int) -> Iterator[Ref]:
        """The objects whose wants fit in what has become free. Once for each time that it has."""
        if self.freed:
            self.freed = False
            for ref, count in self.lacking.items():
                if count <= available:
                    available -= count
                    yield ref


def full(ref: Ref, message: str, mend: str) -> Problem:
    """An object is served, but not as it should be, for want of room."""
    return Problem(message, mend, object=str(ref), severity="warning", reason="MapFull")
