"""What is told of draining: the agent's side of `rebalancer`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pointsman.objects import Ref
from pointsman.rebalance import Progress
from pointsman.rebalancer import Drained

log = logging.getLogger("pointsman.agent")

#: Reason and note of an Event. They say nothing of this node, so that all nodes' are one.
_BEGINS = (
    "DrainBegins",
    "connections are ended at endpoints that hold more than their share, {rate} on each node",
)
_ENDS = {
    "done": ("DrainEnds", "no endpoint holds more than its share of the connections of each node"),
    "stopped": ("DrainEnds", "it was stopped: what is left stays where it is"),
    "failed": ("DrainEnds", "connections can't be ended here: see the agent's log"),
}


class Draining:
    """`say` gets what is worth an Event: object, reason and note."""

    def __init__(self, say: Callable[[Ref, str, str], None]) -> None:
        self._say = say
        self._services: dict[Ref, Progress] = {}
        self._closed = 0
        self._problem = ""

    def take(self, told: Drained) -> None:
        for ref, progress in told.services.items():
            known = ref in self._services
            if not known:
                log.info("%s: %s connections to end", ref, progress.left + progress.closed)
                reason, note = _BEGINS
                self._say(ref, reason, note.format(rate=rate_text(progress.rate)))
            if progress.over:
                log.info("%s: connections ended=%s, %s", ref, progress.closed, _words(progress))
                self._say(ref, *_ENDS[progress.over])
        self._services = {ref: each for ref, each in told.services.items() if not each.over}
        self._closed += told.closed
        if told.problem and told.problem != self._problem:
            log.error("%s", told.problem)
        self._problem = told.problem

    def status(self) -> dict[str, Any]:
        return {
            "closed": self._closed,
            "left": sum(each.left for each in self._services.values()),
            "services": {
                str(ref): {
                    "closed": each.closed,
                    "left": each.left,
                    "rate": rate_text(each.rate),
                    "waits": each.waits,
                }
                for ref, each in sorted(self._services.items())
            },
            "problem": self._problem,
        }


def _words(progress: Progress) -> str:
    return "done" if progress.over == "done" else f"{progress.over}, left={progress.left}"


def rate_text(rate: float) -> str:
    """As the annotation has it."""
    return f"{rate:g}/s" if rate == int(rate) else f"{rate * 60:g}/m"
