"""The one place that talks to systemd: readiness, watchdog, journal.

All of it does nothing where python3-systemd is missing or this process is no unit of systemd's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

try:
    from systemd import daemon, journal
except ImportError:
    daemon = journal = None

# syslog(3)
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
_DEBUG = 7


class Unit:
    """This process as systemd sees it (sd_notify(3), Type=notify). For one thread."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        #: Seconds between two signs of life, 0.0 where nobody waits for them.
        self.interval = _interval(environment)
        self._alive_at = 0.0
        self._status = ""

    def ready(self) -> None:
        """Started, or done with reading everything again."""
        _notify("READY=1")

    def reloading(self) -> None:
        """Reads everything again; `ready` ends that."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        _notify(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self) -> None:
        _notify("STOPPING=1")

    def alive(self) -> None:
        """Call it often, from the loop that must not get stuck: it tells as often as is needed."""
        now = time.monotonic()
        if self.interval and now - self._alive_at >= self.interval:
            self._alive_at = now
            _notify("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        if text != self._status:
            self._status = text
            _notify(f"STATUS={text}")


def _interval(environment: Mapping[str, str]) -> float:
    """A quarter of the time after which the watchdog bites: the loop may be late."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    with contextlib.suppress(ValueError):
        return int(environment.get("WATCHDOG_USEC", "0")) / 4e6
    return 0.0


def _notify(message: str) -> None:
    if daemon is not None:
        with contextlib.suppress(OSError):  # a supervisor that went away is no reason to end
            daemon.notify(message)


def journal_handler(environment: Mapping[str, str] = os.environ) -> logging.Handler | None:
    """What logs to the journal with fields if standard error is a stream to it, else None."""
    if journal is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        status = os.fstat(sys.stderr.fileno())
        if environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
            return JournalHandler()
    return None


class JournalHandler(logging.Handler):
    """Each record as one entry. A record with `problem` (pointsman.events.Problem) has that in
    fields, too: POINTSMAN_OBJECT, _FIELD, _WHERE, _MEND, _REASON."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            journal.send(
                _text(record),
                PRIORITY=next((p for n, p in _PRIORITIES if record.levelno >= n), _DEBUG),
                SYSLOG_IDENTIFIER="pointsman",
                LOGGER=record.name,
                THREAD_NAME=record.threadName or "",
                CODE_FILE=record.pathname,
                CODE_LINE=record.lineno,
                CODE_FUNC=record.funcName,
                **_fields(getattr(record, "problem", None)),
            )
        except Exception:
            self.handleError(record)


def _text(record: logging.LogRecord) -> str:
    return logging.Formatter("%(message)s").format(record)


def _fields(problem: Any) -> dict[str, str]:
    names = ("object", "field", "where", "mend", "reason") if problem else ()
    return {
        f"POINTSMAN_{name.upper()}": value for name in names if (value := getattr(problem, name))
    }
