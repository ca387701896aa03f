"""Seeing that the configuration file changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pointsman.config import mounted
from pointsman.config.configuration import BadConfiguration
from pointsman.dirwatch import DirectoryWatch, Requests

log = logging.getLogger("pointsman.agent")


class ConfigWatch:
    """Watches the directory of a file, or the one given, for it is there that a change is seen
    whichever way it is made: in place, by rename, or by the swap of a mounted ConfigMap's ..data.

    `on_change` is called when what can be read there is another than before, also if that is
    nothing any more; whether it is good is the caller's to find out. It is called once at the
    start, too: whatever was read before the watch stood may be old.

    `quiet` seconds without an event end a change. A link's target elsewhere is looked at every
    `rescan` seconds.
    """

    def __init__(
        self,
        path: Path,
        on_change: Callable[[], None],
        quiet: float = 0.1,
        rescan: float = 30.0,
    ) -> None:
        self._path = path
        self._on_change = on_change
        self._quiet, self._rescan = quiet, rescan
        self._requests = Requests()

    def refresh(self, done: Callable[[], None]) -> None:
        """Has `on_change` called though nothing may have changed, and then `done`, by the thread
        that runs this."""
        self._requests.add(done)

    def run(self, stop: threading.Event) -> None:
        """Until `stop`, which is noticed within a quarter of a second."""
        directory = self._path if self._path.is_dir() else self._path.parent
        with DirectoryWatch(directory, self._rescan, recursive=False) as wake:
            wake.follow()
            if wake.problem:
                log.warning("%s", wake.problem)
            known = self._look()
            self._on_change()
            looked = time.monotonic()
            while not stop.is_set():
                woken = wake.event.wait(0.25)
                if wake.follow() and wake.problem:
                    log.warning("%s", wake.problem)
                requests = self._requests.take()
                if woken or requests or time.monotonic() - looked >= self._rescan:
                    self._settle(wake, stop)
                    now, looked = self._look(), time.monotonic()
                    if now != known or requests:
                        known = now
                        self._on_change()
                for done in requests:
                    done()

    def _look(self) -> tuple[Path, bytes] | str:
        """What is there, or why nothing is."""
        try:
            return mounted.load(self._path)
        except BadConfiguration as bad:
            return str(bad)

    def _settle(self, wake: DirectoryWatch, stop: threading.Event) -> None:
        """Waits for the end of a row of changes, two seconds at most, and of writing."""
        end = time.monotonic() + 2.0
        wake.event.clear()
        while not stop.is_set():
            changes = wake.event.wait(self._quiet) and time.monotonic() < end
            wake.event.clear()
            if not changes and str(self._path) not in wake.writing():
                return
