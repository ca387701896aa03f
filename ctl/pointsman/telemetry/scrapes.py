"""Answers that take their time, on a thread of their own: one after the other, and with rests.

Python runs one thread at a time. So a scrape of endpoints lets go after each millisecond, for twice
as long: neither probes nor a sync wait for it longer than that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from pointsman.telemetry.connection import Later
from pointsman.telemetry.httpwire import Response, text

log = logging.getLogger("pointsman.http")

_SLICE, _SHARE = 0.001, 2  # seconds of work, and so many times as long of rest
_WAITING = 8

#: Makes an answer; calls what it is given every few hundred microseconds of work.
Work = Callable[[Callable[[], None]], Response]


class Dropped(Exception):
    """Nobody waits for the answer any more."""


class Scrapes:
    """The thread begins with the first `ask`. Any thread may call `ask` and `stop`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Work, Later]] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def ask(self, work: Work) -> Response | Later:
        """An answer now means that too many others wait for theirs."""
        later = Later()
        with self._changed:
            self._waiting = deque(each for each in self._waiting if not each[1].dropped)
            if len(self._waiting) >= _WAITING or self._stopped.is_set():
                return text(503, "too many scrapes at once; make them fewer, or farther apart\n")
            self._waiting.append((work, later))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="scrapes", daemon=True)
                self._thread.start()
            self._changed.notify()
        return later

    def stop(self) -> None:
        """Ends the thread, in the middle of an answer if there is one."""
        self._stopped.set()
        with self._changed:
            self._changed.notify()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                work, later = self._waiting.popleft()
            try:
                later.give(work(Pace(later, self._stopped).rest))
            except Dropped:
                pass
            except Exception:
                log.exception("a scrape failed")
                later.give(text(500, "Internal Server Error\n"))


class Pace:
    """Of one answer."""

    def __init__(self, later: Later, stopped: threading.Event) -> None:
        self._later, self._stopped = later, stopped
        self._began = time.monotonic()

    def rest(self) -> None:
        worked = time.monotonic() - self._began
        if worked < _SLICE:
            return
        if self._stopped.wait(_SHARE * worked) or self._later.dropped:
            raise Dropped
        self._began = time.monotonic()
