"""Waking a thread when something below a directory changes: inotify, by watchdog."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from pointsman.events import Problem


class Requests:
    """That everything be read again, from any thread or a signal handler; each request is a
    callback for when it is done."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, done: Callable[[], None]) -> None:
        self._waiting.append(done)

    def take(self) -> list[Callable[[], None]]:
        return [self._waiting.popleft() for _ in range(len(self._waiting))]


class DirectoryWatch(FileSystemEventHandler):
    """Sets `event` on every change below the directory, and keeps the watch on it in place."""

    #: Opening and closing a file to read it are events too: our own reading must not wake us.
    CHANGES = frozenset(("created", "modified", "moved", "deleted", "closed"))

    def __init__(
        self, directory: Path, rescan: float, *, recursive: bool = True, patience: float = 30.0
    ) -> None:
        self.event = threading.Event()
        self.problem: Problem | None = None
        self._directory, self._rescan, self._recursive = directory, rescan, recursive
        self._observer: BaseObserver = Observer()
        self._watched: tuple[str, int, int] | None = None
        self._lost = False
        self._patience = patience
        #: Files that were changed and not closed since, and when the first change was seen.
        self._written: dict[str, float] = {}

    def __enter__(self) -> DirectoryWatch:
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
        if event.event_type != "modified":
            for path in (event.src_path, event.dest_path):  # of a move, else ""
                self._written.pop(os.fsdecode(path), None)
        elif not event.is_directory:
            self._written.setdefault(os.fsdecode(event.src_path), time.monotonic())
        self.event.set()

    def writing(self) -> set[str]:
        """The files that somebody is about to write: `kubectl get … > FILE` empties it at first and
        fills it seconds later. Nobody is waited for longer than `patience` seconds."""
        since, root = time.monotonic() - self._patience, self._watched
        found = set()
        for path, at in list(self._written.items()):
            if at < since:
                self._written.pop(path, None)
            elif root:
                found.add(str(self._directory / os.path.relpath(path, root[0])))
        return found

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
                self._observer.schedule(self, now[0], recursive=self._recursive)
            except OSError as error:
                message = f"it cannot be watched: {error.strerror}"
                mend = (
                    "raise sysctl fs.inotify.max_user_watches and max_user_instances;"
                    f" until then changes are seen within {self._rescan:.0f} s"
                )
                where = str(self._directory)
                self.problem = Problem(message, mend, where, severity="warning")
        return True
