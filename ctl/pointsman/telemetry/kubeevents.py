"""What a Kubernetes Event says, and where: values only. Pure.

The API is events.k8s.io/v1, as in kube-proxy: its series count what comes again, in a field that
may be patched, and it refuses what readers could not rely on, which core/v1 takes. Limits are those
of pkg/apis/core/validation/events.go.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pointsman.events import Problem
from pointsman.objects import Ref

#: Reasons of Problems that give none. "error" and "warning" as in `Problem.severity`.
GENERAL = {"error": "NotInForce", "warning": "NotAsMeant"}
#: Reasons of what is wrong on one node, with an object that is in order.
OF_ONE_NODE = frozenset({"ClusterIPOnNode", "MapFull"})

_VERSIONS = {
    "Service": "v1",
    "Pod": "v1",
    "Node": "v1",
    "Namespace": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
_CONTROLLER = "pointsman"
_NOTE = 1024  # octets
_INSTANCE = 128


class Said(NamedTuple):
    """What an Event says. `salt` makes one of its own of what was said before."""

    ref: Ref
    uid: str
    type: str
    reason: str
    action: str
    note: str
    salt: str = ""

    @property
    def namespace(self) -> str:
        return self.ref.namespace or "default"

    @property
    def name(self) -> str:
        """Follows from all the rest, so that two agents who say the same give the same name."""
        digest = hashlib.blake2b("\0".join(map(str, self)).encode(), digest_size=8).hexdigest()
        return f"{self.ref.name[:200].rstrip('.-')}.{digest}"


def of_problem(problem: Problem, ref: Ref | None, uid: str, node: str) -> Said:
    """A Problem at its object `ref`, or at the Node of this name if the object's uid is "": then
    it is not known to be there."""
    reason = problem.reason or GENERAL.get(problem.severity, GENERAL["error"])
    here = Ref("Node", "", node)
    if ref is None or not uid or ref == here:
        # The kubelet gives a Node's name for its uid; kubectl describe looks for both.
        return Said(
            here, uid if ref == here and uid else node, "Warning", reason, "Sync", cut(str(problem))
        )
    note = ": ".join(filter(None, (problem.field, f"{problem.message}; {problem.mend}")))
    if reason in OF_ONE_NODE:
        note = f"node {node}: {note}"
    return Said(ref, uid, "Warning", reason, "Sync", cut(note))


def body(said: Said, epoch: float, node: str) -> dict[str, Any]:
    """The Event of this agent's, first seen at `epoch` (seconds since 1970), as the API has it."""
    ref = said.ref
    regarding = {"apiVersion": _VERSIONS.get(ref.kind, "v1"), "kind": ref.kind, "uid": said.uid}
    regarding |= {"name": ref.name} | ({"namespace": ref.namespace} if ref.namespace else {})
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": said.name, "namespace": said.namespace},
        "eventTime": micro_time(epoch),
        "type": said.type,
        "reason": said.reason,
        "action": said.action,
        "note": said.note,
        "regarding": regarding,
        "reportingController": _CONTROLLER,
        "reportingInstance": node[:_INSTANCE] or _CONTROLLER,
    }


def ref_of(text: str) -> Ref | None:
    """The object of a Problem, if it is one that can have Events."""
    ref = Ref.parse(text)
    return ref if ref and ref.kind in _VERSIONS else None


def cut(note: str) -> str:
    """As much of it as an Event may have."""
    if len(octets := note.encode()) <= _NOTE:
        return note
    return octets[: _NOTE - 3].decode(errors="ignore") + "…"


def micro_time(epoch: float) -> str:
    """As metav1.MicroTime: always six digits."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
