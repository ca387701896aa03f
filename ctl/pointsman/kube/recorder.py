"""Kubernetes Events: what an operator must act on, told at the object where it is to be mended.

Every node's agent finds the same fault in a Service. So an Event's name follows from what it says:
the first agent writes it, the others are told that it exists (409), and there is one Event instead
of one for each node. What concerns one node only says so in its note, and is one for each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pointsman.events import Problem
from pointsman.kube.api import ApiError
from pointsman.objects import Ref
from pointsman.telemetry.kubeevents import Said, body, cut, micro_time, of_problem, ref_of

log = logging.getLogger("pointsman.events")

#: What becomes of an Event: written; counted up in one that is there; another agent wrote it; the
#: API server refused it; not even tried, because there were too many.
RESULTS = ("written", "again", "known", "failed", "dropped")
_API = "/apis/events.k8s.io/v1"
_HOUR = 3600.0  # kube-apiserver's --event-ttl
_ROOM = 256  # Events that wait
_MEMORY = 1024  # Events and objects that are remembered
_PAUSE = 10.0  # seconds to wait while the API server is away
_TRIES = 5


class Post(Protocol):
    def __call__(self, path: str, value: object, /) -> bytes: ...


class Bucket:
    """`burst` tokens, and `rate` more a second up to that."""

    def __init__(self, burst: int, rate: float, now: float) -> None:
        self._burst, self._rate = burst, rate
        self._tokens, self._at = float(burst), now

    def wait(self, now: float) -> float:
        """Takes a token and gives 0, or gives the seconds until there is one."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate


@dataclass(slots=True)
class _Told:
    at: float
    ours: bool
    count: int = 1


class Recorder:
    """Writes Events on a thread of its own; what goes wrong there ends there.

    `post` and `patch` (a JSON merge patch) are kube.client.ApiServer's and raise ApiError.
    `uid_of` gives the uid of an object, "" if it is not known; it is called where `problems` and
    `say` are. `count` is told what became of each Event, one of RESULTS. `clock` gives seconds
    since 1970. All objects together may have `burst` Events at once and `rate` a second after
    that; one object 25, and one each five minutes, as client-go's spam filter has it.
    """

    def __init__(
        self,
        post: Post,
        patch: Post,
        *,
        node_name: str,
        uid_of: Callable[[Ref], str],
        count: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        burst: int = 50,
        rate: float = 1.0,
    ) -> None:
        self._post, self._patch = post, patch
        self._node = Ref("Node", "", node_name)
        self._uid_of = uid_of
        self._count = count
        self._clock = clock
        self._all = Bucket(burst, rate, clock())
        self._each: dict[Ref, Bucket] = {}
        self._changed = threading.Condition()
        self._waiting: dict[Said, None] = {}
        self._standing: dict[Problem, Said] = {}
        self._told: dict[Said, _Told] = {}
        self._complained: set[int] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What waits is not written any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def problems(self, found: Iterable[Problem]) -> None:
        """Everything that is wrong now. New ones become Events; one that stands has one already,
        and one that was mended before its turn gets none."""
        now = set(found)
        mended = [problem for problem in self._standing if problem not in now]
        new = sorted((each for each in now if each not in self._standing), key=_urgency)
        said = {problem: self._said(problem) for problem in new}
        with self._changed:
            for problem in mended:
                self._waiting.pop(self._standing.pop(problem), None)
            self._standing |= said
            for each in said.values():
                self._offer(each)
            self._changed.notify()

    def attached(self) -> None:
        """The node is served from now on: kube-proxy's Event, at the Node."""
        self.say(self._node, "Normal", "Starting", "")

    def normal(self, ref: Ref, reason: str, note: str) -> None:
        """One that all nodes say alike, and so is one for all of them; none of what is gone."""
        if uid := self._uid_of(ref):
            self._say(Said(ref, uid, "Normal", reason, reason, cut(note), "all"))

    def say(self, ref: Ref, type: str, reason: str, message: str) -> None:
        """An Event that is no Problem, such as ("Normal", "Starting") at the Node."""
        uid = self._uid_of(ref) or (ref.name if ref.kind == "Node" else "")
        self._say(Said(ref, uid, type, reason, reason, cut(message), f"{self._clock():.6f}"))

    def _say(self, said: Said) -> None:
        with self._changed:
            self._offer(said)
            self._changed.notify()

    def _said(self, problem: Problem) -> Said:
        ref = ref_of(problem.object)
        return of_problem(problem, ref, self._uid_of(ref) if ref else "", self._node.name)

    def _offer(self, said: Said) -> None:
        if len(self._waiting) < _ROOM:
            self._waiting[said] = None
        else:
            self._count("dropped")

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        tries = 0
        while said := self._next():
            try:
                result = self._write(said)
            except ApiError as error:
                tries += bool(error.status)
                if _may_pass(error) and tries < _TRIES:
                    self._put_back(said, max(_PAUSE, error.retry_after))
                    continue
                self._complain(error)
                result = "failed"
            except Exception:
                log.exception("an Event could not be written")
                result = "failed"
            tries = 0
            self._count(result)

    def _next(self) -> Said | None:
        """Waits for an Event whose turn it is; None at the end."""
        with self._changed:
            while not self._stopping:
                if not self._waiting:
                    self._changed.wait()
                elif wait := self._all.wait(self._clock()):
                    self._changed.wait(wait)
                else:
                    said = next(iter(self._waiting), None)
                    if said is None:
                        continue
                    del self._waiting[said]
                    if self._of(said.ref).wait(self._clock()):
                        self._count("dropped")
                        continue
                    return said
        return None

    def _of(self, ref: Ref) -> Bucket:
        if (bucket := self._each.get(ref)) is None:
            _forget(self._each)
            bucket = self._each[ref] = Bucket(25, 1 / 300, self._clock())
        return bucket

    def _write(self, said: Said) -> str:
        now = self._clock()
        path = f"{_API}/namespaces/{said.namespace}/events"
        told = self._told.get(said)
        if told and now - told.at < _HOUR:
            if not told.ours:
                return "known"
            series = {"count": told.count + 1, "lastObservedTime": micro_time(now)}
            try:
                self._patch(f"{path}/{said.name}", {"series": series})
            except ApiError as error:
                if error.status != 404:
                    raise
            else:
                told.at, told.count = now, told.count + 1
                return "again"
        ours = True
        try:
            self._post(path, body(said, now, self._node.name))
        except ApiError as error:
            if error.status != 409:
                raise
            ours = False
        self._told.pop(said, None)
        _forget(self._told)
        self._told[said] = _Told(now, ours)
        return "written" if ours else "known"

    def _put_back(self, said: Said, pause: float) -> None:
        """In front of the others, unless it was mended meanwhile."""
        with self._changed:
            if said.salt or said in self._standing.values():
                self._waiting = {said: None, **self._waiting}
            if not self._stopping:
                self._changed.wait_for(lambda: self._stopping, pause)

    def _complain(self, error: ApiError) -> None:
        """Once for each status: without the right to write Events, every one would fail."""
        if error.status not in self._complained:
            self._complained.add(error.status)
            log.warning(
                "Kubernetes Events are not written: %s; may this account create and patch events "
                "of events.k8s.io?",
                error,
            )


def _urgency(problem: Problem) -> tuple[bool, str]:
    return problem.severity != "error", str(problem)


def _may_pass(error: ApiError) -> bool:
    """Whether the same again can succeed: the way, the token, the load."""
    return error.status in (0, 401, 429) or error.status >= 500


def _forget(memory: dict[Any, Any]) -> None:
    """Makes room for one more, at the cost of the oldest."""
    if len(memory) >= _MEMORY:
        del memory[next(iter(memory))]
