"""The Kubernetes source: one reflector for each resource, their findings put together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pointsman.events import Changed, Event, Listed, Problem, Problems, Reach
from pointsman.kube import remembered
from pointsman.kube.api import Api
from pointsman.kube.backoff import Backoff
from pointsman.kube.reflector import Reflector, Watched
from pointsman.kube.resources import resources
from pointsman.objects import Object, Ref

_GRACE = 3.0  # seconds that a watch may be down before it is told
_LOOK = 0.2  # seconds between two looks at that, and at `stop`
_END = 1.0  # seconds that the threads get to end


class Uncounted:
    """`Watched` for those who count nothing."""

    def relisted(self, resource: str) -> None: ...
    def event(self, resource: str, type: str) -> None: ...
    def bookmark(self, resource: str) -> None: ...
    def watch_failed(self, resource: str, reason: str) -> None: ...


class ClusterSource:
    """Objects of an API server, for the agent of one node. `run` belongs to one thread; `where` is
    for any.

    `proxy_name`: only Services that carry it in the label service.kubernetes.io/service-proxy-name,
    "" for those that carry none. `with_others`: the Services of other proxies as well, for their
    addresses are in use. `with_headless`: for a DNS of our own. `with_cidrs`: ServiceCIDRs,
    too. `state_dir` keeps what leads to the API server at the next start.
    """

    def __init__(
        self,
        api: Api,
        *,
        node_name: str,
        state_dir: Path,
        proxy_name: str = "",
        with_others: bool = False,
        with_headless: bool = False,
        with_cidrs: bool = True,
        metrics: Watched | None = None,
        backoff: Callable[[], Backoff] = Backoff,
        grace: float = _GRACE,
    ) -> None:
        self._api, self._state_dir, self._grace = api, state_dir, grace
        self._metrics, self._backoff = metrics or Uncounted(), backoff
        found = resources(
            node_name=node_name,
            proxy_name=proxy_name,
            with_others=with_others,
            with_headless=with_headless,
            with_cidrs=with_cidrs,
        )
        self._resources = {resource.kind: resource for resource in found}
        self._reflectors: list[Reflector] = []
        self._lock = threading.Lock()
        self._put: Callable[[Event], None] = lambda event: None
        self._stopped = False
        #: Until all first lists are in: what is known so far, and of which kinds nothing is.
        self._first: dict[Ref, Object] | None = {}
        self._waiting = set(self._resources)
        self._problems: dict[str, tuple[Problem, ...]] = dict.fromkeys(self._resources, ())
        self._told: tuple[Problem, ...] = ()
        #: Kinds whose watch does not run: since when (monotonic), and why.
        self._down = dict.fromkeys(self._resources, (time.monotonic(), ""))
        self._reach: tuple[str, str] | None = None
        self._branch = remembered.Branch(remembered.load(state_dir))
        self._remember()

    def where(self, ref: Ref) -> str:
        """The API path of an object, "" for kinds that are not watched."""
        resource = self._resources.get(ref.kind)
        return resource.object_path(ref) if resource else ""

    def run(self, put: Callable[[Event], None], stop: threading.Event) -> None:
        """Puts Listed once every first list is in, then Changed as it comes; Problems when they
        differ from the last (at first: from none); Reach when all watches run, when one has been
        down for some seconds, and when all run again. After it returned nothing is put.

        Notices `stop` within a quarter of a second. Raises what a thread of its own ended by: that
        is a mistake in here, for whatever an API server does is borne.
        """
        with self._lock:
            self._put = put
        failed: list[BaseException] = []
        self._reflectors = reflectors = [
            Reflector(self._api, resource, self, self._metrics, self._backoff())
            for resource in self._resources.values()
        ]
        threads = [
            threading.Thread(target=_kept(r.run, failed), name=f"watch-{kind}", daemon=True)
            for r, kind in zip(reflectors, self._resources, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            while not stop.wait(_LOOK) and not failed:
                self._look()
        finally:
            with self._lock:
                self._stopped = True
            for reflector in reflectors:
                reflector.stop()
            # A request that hangs may last longer; nothing comes of it any more.
            end = time.monotonic() + _END
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
        if failed:
            raise failed[0]

    # -- what reflectors tell, each from its own thread ----------------------------------------

    def listed(self, kind: str, changed: Changed) -> None:
        with self._lock:
            self._waiting.discard(kind)
            self._take(changed)
        self._reached()

    def changed(self, kind: str, changed: Changed) -> None:
        with self._lock:
            self._take(changed)

    def problems(self, kind: str, problems: tuple[Problem, ...]) -> None:
        with self._lock:
            self._problems[kind] = problems
            found = tuple(problem for each in self._problems.values() for problem in each)
            if found != self._told:
                self._told = found
                self._tell(Problems(found))

    def up(self, kind: str) -> None:
        with self._lock:
            self._down.pop(kind, None)
        self._reached()

    def down(self, kind: str, error: str) -> None:
        with self._lock:
            since, _ = self._down.get(kind, (time.monotonic(), ""))
            self._down[kind] = (since, error)

    def _reached(self) -> None:
        for reflector in self._reflectors:
            reflector.reached()

    # -- putting, under the lock ---------------------------------------------------------------

    def _take(self, changed: Changed) -> None:
        if self._branch.follow(changed.objects, changed.deleted):
            self._remember()
            remembered.save(self._state_dir, self._branch.now)
        if self._first is None:
            if changed.objects or changed.deleted:
                self._tell(changed)
            return
        for ref in changed.deleted:
            self._first.pop(ref, None)
        self._first.update((obj.ref, obj) for obj in changed.objects)
        if not self._waiting:
            listed = Listed(tuple(self._first.values()))
            self._first = None
            self._tell(listed)

    def _tell(self, event: Event) -> None:
        if not self._stopped:
            self._put(event)

    def _remember(self) -> None:
        now = self._branch.now
        self._api.remember(now.cluster_ips, now.endpoints)

    def _look(self) -> None:
        """Tells whether the API server answers, if that differs from what was told last."""
        with self._lock:
            since, error = min((d for d in self._down.values() if d[1]), default=(0.0, ""))
            if self._down and not error and self._reach is None:
                since, error = min(self._down.values())[0], "no answer yet"
            if self._down and (not error or time.monotonic() - since < self._grace):
                return
            if self._reach != (self._api.server, error):
                self._reach = (self._api.server, error)
                ago = time.monotonic() - since if error else 0.0
                self._tell(Reach(self._api.server, time.time() - ago, error))


def _kept(target: Callable[[], None], failed: list[BaseException]) -> Callable[[], None]:
    def run() -> None:
        try:
            target()
        except BaseException as error:
            failed.append(error)

    return run
