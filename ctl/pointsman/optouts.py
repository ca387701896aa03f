"""Finds the network namespaces of opted-out pods by their addresses, on a thread of its own."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Mapping

from pointsman import netns
from pointsman.netns import Inside
from pointsman.values import Address

log = logging.getLogger("pointsman.agent")

_SOON, _LATER = 1.0, 15.0  # seconds: a pod's namespace comes after its object, and may be replaced


class OptOuts:
    """`want` may be called from any thread, `run` is the body of its own. `found` is called there
    with the namespaces that have one of the wanted addresses, by address."""

    def __init__(self, found: Callable[[Mapping[Address, Inside]], None]) -> None:
        self._found = found
        self._changed = threading.Condition()
        #: None until something was wanted: then nothing is known, what the maps hold stays.
        self._wanted: frozenset[Address] | None = None
        self._due = self._stopped = False

    def want(self, addresses: frozenset[Address]) -> None:
        with self._changed:
            if addresses != self._wanted:
                self._wanted, self._due = addresses, True
                self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Until `stop`."""
        known: Mapping[Address, Inside] | None = None
        while True:
            with self._changed:
                if not self._due and not self._stopped:
                    self._changed.wait(self._pause(known or {}))
                if self._stopped:
                    return
                self._due, wanted = False, self._wanted
            if wanted is None:
                continue
            try:
                now = netns.found_in(wanted)
            except OSError as error:  # too many open files, say; what was found holds
                if error.errno == errno.ENOPROTOOPT:
                    log.warning("no pod can opt out on this kernel: %s", error)
                    self._found({})  # devices wait for what the first search finds
                    return
                log.warning("opted-out pods are looked for again: %s", error)
                continue
            if now != known:
                known = now
                self._found(now)

    def _pause(self, known: Mapping[Address, Inside]) -> float | None:
        if not self._wanted:
            return None
        return _LATER if known.keys() >= self._wanted else _SOON
