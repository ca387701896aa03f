"""What is known of the objects of one resource: their versions, and which of them are bad. Pure.

The objects themselves are kept once, by the tracker.
"""

from __future__ import annotations

from collections.abc import Iterable

from pointsman.events import Changed, Problem
from pointsman.kube.decode import Noted, Page
from pointsman.objects import Object, Ref


class Known:
    """A bad object's last good version stays in force until the object is mended or deleted."""

    def __init__(self) -> None:
        #: What is in force, with the resourceVersion of that.
        self.versions: dict[Ref, str] = {}
        #: What is wrong with objects, in force or not.
        self.found: dict[Ref, tuple[Problem, ...]] = {}

    def fold(self, notes: Iterable[Noted]) -> Changed:
        """Takes in watch events, in their order; what they come to, each object once."""
        last = {note.item.ref: (note.type, note.item) for note in notes if note.item}
        objects: list[Object] = []
        deleted: list[Ref] = []
        for ref, (type_, item) in last.items():
            self.found.pop(ref, None)
            if item.problems:
                self.found[ref] = item.problems
            if item.object is not None:
                self.versions[ref] = item.version
                objects.append(item.object)
            elif type_ == "DELETED" and self.versions.pop(ref, None) is not None:
                deleted.append(ref)
        return Changed(tuple(objects), tuple(deleted))


class Listing:
    """A list that comes in pages. Nothing of it is known until `settle`."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._versions: dict[Ref, str] = {}
        self._problems: dict[Ref, tuple[Problem, ...]] = {}
        self._held: set[Ref] = set()
        self._objects: list[Object] = []
        self._whole = True

    def add(self, page: Page) -> None:
        before = self._known.versions
        self._whole = self._whole and page.whole
        for ref, version, obj, problems in page.items:
            if problems:
                self._problems[ref] = problems
            if obj is None:
                self._held.add(ref)
                continue
            self._versions[ref] = version
            if before.get(ref) != version:
                self._objects.append(obj)

    def settle(self) -> Changed:
        """Makes it what is known; all that differs from before, in one step. What a nameless
        object might be is not taken away."""
        known = self._known
        kept = {
            ref: version
            for ref, version in known.versions.items()
            if ref not in self._versions and (ref in self._held or not self._whole)
        }
        deleted = known.versions.keys() - self._versions.keys() - kept.keys()
        known.versions = self._versions | kept
        known.found = self._problems
        return Changed(tuple(self._objects), tuple(sorted(deleted)))
