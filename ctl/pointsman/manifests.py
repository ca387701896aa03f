"""The manifests source: a directory of the files that `kubectl apply` takes, watched.

It keeps what all files say together: which file each object is from when several name it, and the
last good version of each object, for a bad file or object never takes anything away. Neither does
a directory that goes away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from pointsman import lastgood
from pointsman.dirwatch import DirectoryWatch, Requests
from pointsman.documents import ManifestFile
from pointsman.events import Changed, Event, Listed, Problem, Problems
from pointsman.manifestfiles import load, signature, walk
from pointsman.objects import Object, Ref

MAX_BYTES = 16 << 20


class ManifestSource:
    """The objects in a directory's manifests. `read` and `run` belong to one thread; `where` is
    for any.

    `max_bytes` is the most a file may have. Changes are read once the directory has been quiet
    for `quiet` seconds (or has been busy for 20 times that), a file that is being written once it
    is closed (or was open for `patience` seconds), and everything is looked at again every `rescan`
    seconds, for file systems that tell no one about changes. `memory` is a file where `run` keeps
    the last good versions for the next start.
    """

    def __init__(
        self,
        directory: Path,
        memory: Path | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        quiet: float = 0.06,
        rescan: float = 30.0,
        patience: float = 30.0,
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._quiet = quiet
        self._rescan = rescan
        self._patience = patience
        self._files: dict[str, ManifestFile] = {}
        #: The files that name an object, the one that was there first in front.
        self._claims: dict[Ref, list[str]] = {}
        #: Each object in force and the file it is from.
        self._in_force: dict[Ref, tuple[str, Object]] = {}
        self._faults: list[Problem] = []
        #: What is in force is not what was saved; the earliest time to save it.
        self._unsaved, self._save_at = False, 0.0
        #: The files that are not to be read now: half of one would delete the other half.
        self._writing: Callable[[], Collection[str]] = tuple
        #: The directory itself could not be read the last time.
        self._blind = False
        #: Of the file system that the directory was on when it was last read.
        self._device: int | None = None
        self._memory = memory
        self._recalled = memory is None
        self._requests = Requests()

    def refresh(self, done: Callable[[], None]) -> None:
        """Has `run` look at the directory now, and call `done` once it has put what it found."""
        self._requests.add(done)

    def read(self) -> tuple[Listed, Problems]:
        """Reads what has changed since the last time (at first: all) and gives the whole state."""
        self._scan()
        return self._listed(), Problems(tuple(self._problems()))

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None:
        """Puts Listed first, then Changed and Problems as they come, until `stop` is set.

        Problems is put only when the list differs from the last (at first: from none). A directory
        that is missing or unreadable is a Problem and says nothing about the objects: there is no
        Listed before it was read once, and later the last state stays. Notices `stop` within a
        quarter of a second.
        """
        watch = DirectoryWatch(self._directory, self._rescan, patience=self._patience)
        with watch as wake:
            wake.follow()  # before the first reading, so that no change falls between the two
            self._writing = wake.writing
            listed, _ = self.read()
            known = not self._blind
            if known:
                put(listed)
                self._unsaved = True
            told: list[Problem] = []
            looked = time.monotonic()
            requests: list[Callable[[], None]] = []
            while not stop.is_set():
                problems = self._problems() + ([wake.problem] if wake.problem else [])
                if problems != told:
                    put(Problems(tuple(problems)))
                    told = problems
                for done in requests:
                    done()
                woken = wake.event.wait(0.25)
                elsewhere = wake.follow()
                requests = self._requests.take()
                if woken or elsewhere or requests or time.monotonic() - looked >= self._rescan:
                    self._settle(wake.event)
                    changed = self._scan()
                    if not known and not self._blind:
                        known = True
                        put(self._listed())
                        self._unsaved = True
                    elif changed.objects or changed.deleted:
                        put(changed)
                        self._unsaved = True
                    looked = time.monotonic()
                if time.monotonic() >= self._save_at:
                    self._remember()
            self._remember()

    def where(self, ref: Ref) -> str:
        """The file that an object in force is from, "" if it is not in force."""
        path, _ = self._in_force.get(ref, ("", None))
        return path

    def _recall(self) -> set[Ref]:
        """After the first reading: what was in force before the restart stands in for what is bad
        now. Gives the objects concerned."""
        self._recalled = True
        bad = {path: file for path, file in self._files.items() if file.held or not file.whole}
        recalled = set()
        for path, obj in lastgood.load(self._memory) if bad and self._memory else ():
            file = bad.get(path)
            if file and (obj.ref in file.held or not file.whole) and obj.ref not in file.objects:
                if obj.ref not in file.refs:
                    self._claims.setdefault(obj.ref, []).append(path)
                file.held.add(obj.ref)
                self._in_force.setdefault(obj.ref, (path, obj))
                recalled.add(obj.ref)
        return recalled

    def _remember(self) -> None:
        """Saves what is in force, if it is not what was saved. It takes a hundredth of the time
        at most: with ten thousand Services it is 30 MB."""
        if not self._unsaved:
            return
        self._unsaved = False
        if self._memory:
            began = time.monotonic()
            lastgood.save(self._memory, self._in_force.values(), self._device or 0)
            now = time.monotonic()
            self._save_at = now + 100 * (now - began)

    def _settle(self, event: threading.Event) -> None:
        """Waits for the end of a burst of events."""
        end = time.monotonic() + 20 * self._quiet
        while True:
            event.clear()
            if not event.wait(self._quiet) or time.monotonic() > end:
                return

    def _scan(self) -> Changed:
        directory = str(self._directory)
        found = walk(directory)
        self._faults, unreadable = list(found.faults), list(found.unreadable)
        moved = self._device is not None and found.root and found.root[0] != self._device
        if moved and self._files and not found.files:
            # An unmounted directory is not missing: what it was mounted on comes to light.
            message = "it is empty now, and on another file system than before: is it unmounted?"
            mend = "mount it again; if it is to be empty, "
            mend += f"remove {self._memory} and restart the agent"
            self._faults.append(Problem(message, mend, directory))
            unreadable.append(directory)
        elif (
            not self._recalled and found.root and not found.files and self._memory
            and lastgood.had_objects(self._memory, self._directory, not_on=found.root[0])
        ):  # fmt: skip
            # The same, while no agent looked: nothing is taken away for it.
            message = "it is empty, and on another file system than when the agent last ran: "
            message += "is it unmounted?"
            mend = f"mount it; if it is to be empty, remove {self._memory}"
            self._faults.append(Problem(message, mend, directory))
            unreadable.append(directory)
        elif found.root:
            self._device = found.root[0]
        self._blind = directory in unreadable
        gone = [
            path
            for path in self._files.keys() - found.files.keys()
            if not any(Path(path).is_relative_to(place) for place in unreadable)
        ]
        touched: set[Ref] = set()
        for path in gone:
            touched |= self._replace(path, None)
        writing = self._writing()
        for path, status in sorted(found.files.items()):
            before = self._files.get(path)
            if before and path in writing:
                continue
            if before is None or before.signature != signature(status):
                file = load(path, status, self._max_bytes)
                # Gone since the walk: the next one tells whether the directory is, too.
                if file:
                    touched |= self._replace(path, file)
        if not self._recalled and not self._blind:
            touched |= self._recall()
        return self._settle_claims(touched)

    def _replace(self, path: str, file: ManifestFile | None) -> set[Ref]:
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

    def _listed(self) -> Listed:
        return Listed(tuple(obj for _, (_, obj) in sorted(self._in_force.items())))

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
