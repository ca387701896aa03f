"""One resource, listed and then watched, for as long as the agent runs.

The rules are those of client-go's reflector (tools/cache/reflector.go): see `_list` and `_watch`.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from pointsman.events import Changed, Problem
from pointsman.kube.api import Api, ApiError, Stream
from pointsman.kube.backoff import Backoff
from pointsman.kube.decode import Decoder, Noted
from pointsman.kube.known import Known, Listing
from pointsman.kube.resources import Resource

log = logging.getLogger("pointsman.kube")

_PAGE = "500"
_ABSENT = 600.0  # seconds until a resource that the server does not have is asked for again
_LONG = 30.0  # seconds after which a watch did live, however it ends
_SHORT = 1.0  # seconds: a watch that ends sooner, without an event, did not work
_REFUSALS = 3  # of a watch in a row, after which its version is not trusted any more


class Watched(Protocol):
    """What is counted, by the resource's plural name."""

    def relisted(self, resource: str) -> None: ...
    def event(self, resource: str, type: str) -> None: ...
    def bookmark(self, resource: str) -> None: ...
    def watch_failed(self, resource: str, reason: str) -> None: ...


class Sink(Protocol):
    """Where a reflector's findings go, by the kind of its objects. `listed` comes first, and again
    after each new list; between them `changed`."""

    def listed(self, kind: str, changed: Changed) -> None: ...
    def changed(self, kind: str, changed: Changed) -> None: ...
    def problems(self, kind: str, problems: tuple[Problem, ...]) -> None: ...
    def up(self, kind: str) -> None: ...
    def down(self, kind: str, error: str) -> None: ...


class Reflector:
    """`run` belongs to one thread; `stop` and `reached` are for any, and wake it."""

    def __init__(
        self,
        api: Api,
        resource: Resource,
        sink: Sink,
        metrics: Watched,
        backoff: Backoff,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._resource, self._sink = api, resource, sink
        self._metrics, self._backoff, self._clock = metrics, backoff, clock
        self._kind, self._name = resource.kind, resource.plural
        self._decoder = Decoder(resource.kind)
        self._known = Known()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._unreached = self._expired = False
        self._stream: Stream | None = None
        #: Where the watch goes on; "" if there is nothing to go on from.
        self._version = ""
        #: The first list may be a little old, for which the API server need not ask etcd. Once a
        #: version proved too old, only the most recent will do.
        self._list_at = "0"
        self._refusals = 0
        self._listed = False
        self._said = ""

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        if stream := self._stream:
            stream.close()

    def reached(self) -> None:
        """Another reflector reached the API server: who could not tries again at once."""
        if self._unreached:
            self._wake.set()

    def run(self) -> None:
        """Until `stop`. Raises nothing of what an API server or the way there may do."""
        verb = "list"
        while not self._stop.is_set():
            try:
                verb = "list"
                if not self._version:
                    self._list()
                verb = "watch"
                self._watch()
            except ApiError as error:
                self._wake.clear()
                unreached = error.reason in ("Unreachable", "Untrusted")
                if self._unreached and error.status in (401, 403):
                    # A server that has just come back refuses everybody until it has its roles.
                    self._backoff.reset()
                self._unreached = unreached
                if not self._stop.is_set():
                    self._wake.wait(self._failed(verb, error))

    # -- listing -----------------------------------------------------------------------------

    def _list(self) -> None:
        """All pages. The watch cache of older servers gives all in one for resourceVersion 0, and
        a page after the first is always of the version of the first. When that is compacted away
        meanwhile, the list is asked for whole, for which there is no such end."""
        query = {**self._resource.selectors, "limit": _PAGE}
        if self._list_at:
            query["resourceVersion"] = self._list_at
        try:
            listing, version = self._pages(query)
        except ApiError as error:
            if not error.expired:
                raise
            self._list_at = ""
            listing, version = self._pages(self._resource.selectors)
        self._version, self._list_at, self._refusals = version, "", 0
        self._metrics.relisted(self._name)
        self._settle(listing)
        self._unreached = False

    def _settle(self, listing: Listing) -> None:
        self._listed = True
        self._sink.listed(self._kind, listing.settle())
        self._tell_problems()

    def _tell_problems(self, *more: Problem) -> None:
        where = self._resource.object_path
        found = [(ref, problem) for ref, each in self._known.found.items() for problem in each]
        told = [replace(problem, where=where(ref)) for ref, problem in found]
        self._sink.problems(self._kind, (*told, *more))

    def _pages(self, query: dict[str, str]) -> tuple[Listing, str]:
        listing = Listing(self._known)
        while True:
            page = self._decoder.page(self._api.get(self._resource.path, query))
            listing.add(page)
            if not page.more:
                return listing, page.version
            query = {**self._resource.selectors, "limit": _PAGE, "continue": page.more}

    # -- watching ----------------------------------------------------------------------------

    def _watch(self) -> None:
        """From the known version on, until the server ends it. Events that came together become
        one change; a bookmark moves the version only."""
        seconds = random.randint(300, 600)  # noqa: S311 - so that not all nodes come back at once
        query = {
            **self._resource.selectors,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
        }
        began, fruitful = self._clock(), False
        self._stream = stream = self._api.stream(self._resource.path, query, seconds)
        try:
            if self._stop.is_set():
                return
            self._unreached = False
            self._sink.up(self._kind)
            self._tell_problems()
            for lines in stream:
                fruitful = self._take(lines) or fruitful
                if self._stop.is_set():
                    return
        except ApiError:
            if self._clock() - began >= _LONG:
                self._lived()
            raise
        finally:
            self._stream = None
            stream.close()
        if not fruitful and self._clock() - began < _SHORT and not self._stop.is_set():
            raise ApiError(0, "Cut", "the watch ended at once")
        self._lived()

    def _take(self, lines: list[bytes]) -> bool:
        """Whether there was anything. What stands before a bad line counts."""
        notes: list[Noted] = []
        try:
            for line in lines:
                if line.strip():
                    notes.append(self._decoder.line(line))
        finally:
            for note in notes:
                self._version = note.version or self._version
                if note.item:
                    self._metrics.event(self._name, note.type)
                elif note.type == "BOOKMARK":
                    self._metrics.bookmark(self._name)
            if notes:
                self._lived()
                changed = self._known.fold(notes)
                if changed.objects or changed.deleted:
                    self._sink.changed(self._kind, changed)
                self._tell_problems()
        return bool(notes)

    def _lived(self) -> None:
        self._backoff.reset()
        self._refusals, self._expired, self._said = 0, False, ""

    # -- failing -----------------------------------------------------------------------------

    def _failed(self, verb: str, error: ApiError) -> float:
        """Sets what is tried next; how many seconds from now."""
        self._metrics.watch_failed(self._name, error.reason or str(error.status))
        if error.status == 400 and verb == "list" and self._resource.fields_may_lack:
            log.info("resource=%s the server does not know its field selector", self._name)
            self._resource = self._resource.without_fields()
            return 0.0
        if error.status == 404 and verb == "list" and self._resource.optional:
            return self._absent()
        if error.status == 403 and self._resource.spare:
            return self._forbidden(verb, error)
        self._sink.down(self._kind, f"{verb} {self._name}: {error.message}")
        if problem := _problem(self._resource, verb, error):
            self._tell_problems(problem)
        if error.expired:
            # That is an answer: what came before it, while the server was away, says no more.
            if not self._expired:
                self._backoff.reset()
            self._version, self._expired = "", True
        elif verb == "watch" and error.status not in (0, 401, 403, 429):
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                self._version = ""
        wait = self._backoff.after(error.retry_after)
        # An outage may last for hours: each of its reasons is worth one line.
        level = logging.DEBUG if str(error) == self._said else logging.INFO
        self._said = str(error)
        log.log(level, "resource=%s %s failed, again in %.1f s: %s", self._name, verb, wait, error)
        return wait

    def _forbidden(self, verb: str, error: ApiError) -> float:
        """Nobody waits for what may not be seen. What was seen before stays."""
        if not self._listed:
            self._settle(Listing(self._known))
        if problem := _problem(self._resource, verb, error):
            self._tell_problems(replace(problem, message=f"{problem.message}; it goes on without"))
        self._sink.up(self._kind)
        return self._backoff.after(error.retry_after)

    def _absent(self) -> float:
        """The server has no such resource: as if there were none of them."""
        self._settle(Listing(self._known))
        message = f"the API server has no {self._name} ({self._resource.root})"
        mend = "nothing needs to be done unless it should: it is asked for again"
        self._tell_problems(Problem(message, mend, self._resource.path, severity="warning"))
        self._sink.up(self._kind)
        return _ABSENT


def _problem(resource: Resource, verb: str, error: ApiError) -> Problem | None:
    """What only an operator can mend."""
    place = resource.path
    if error.status == 403:
        group = f'"{resource.group}"'
        mend = f"allow verb {verb} on resource {resource.plural} of apiGroup {group} in the "
        return Problem(error.message, f"{mend}agent's ClusterRole", place, reason="Forbidden")
    if error.status == 401:
        mend = "renew the agent's token or certificate; the log tells if reading it failed"
        return Problem(f"not who it should be: {error.message}", mend, place, reason="Unauthorized")
    if error.status == 404:
        mend = "it is there from Kubernetes 1.21 on: is this the URL of an API server?"
        return Problem(f"the server has no {resource.plural}", mend, place, reason="NotFound")
    return None
