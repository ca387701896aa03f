"""Which pods want their sockets left alone. Pure.

A service mesh or a sandboxed runtime may have to see the ClusterIP that a pod dials. The annotation
`pointsman.io/socket-lb: disabled` on a Pod, or on its Namespace, leaves that to them; what a pod
says itself goes before what its namespace says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pointsman.context import Context
from pointsman.events import Problem
from pointsman.hostports import pod_addresses, runs_here
from pointsman.names import show
from pointsman.objects import Namespace, Pod, Ref
from pointsman.values import Address

ANNOTATION = "pointsman.io/socket-lb"
_FIELD = f"metadata.annotations[{ANNOTATION}]"
_VALUES = {"disabled": True, "enabled": False}


def opted_out(
    pods: Iterable[Pod], namespaces: Mapping[Ref, Namespace], context: Context
) -> tuple[frozenset[Address], tuple[Problem, ...]]:
    """The addresses of the pods on this node whose sockets are not to be translated.

    A value that is neither "disabled" nor "enabled" counts as "enabled", and is a Problem.
    """
    problems = []
    by_namespace: dict[str, bool] = {}
    for namespace in namespaces.values():
        if (value := namespace.metadata.annotations.get(ANNOTATION)) is not None:
            by_namespace[namespace.metadata.name] = _VALUES.get(value, False)
            if value not in _VALUES:
                problems.append(_unknown(namespace.ref, value))
    addresses: set[Address] = set()
    for pod in pods:
        if not runs_here(pod, context):
            continue
        value = pod.metadata.annotations.get(ANNOTATION)
        if value is None:
            out = by_namespace.get(pod.metadata.namespace, False)
        else:
            out = _VALUES.get(value, False)
            if value not in _VALUES:
                problems.append(_unknown(pod.ref, value))
        if out and pod.spec.host_network:
            # With its namespace it may have been meant to go along; by itself it was not.
            if value is not None:
                problems.append(_host_network(pod.ref))
        elif out:
            addresses.update(pod_addresses(pod))
    return frozenset(addresses), tuple(problems)


def _unknown(ref: Ref, value: str) -> Problem:
    return Problem(
        object=str(ref),
        field=_FIELD,
        message=f"{show(value)} is unknown, so sockets are translated",
        mend="write disabled or enabled",
        severity="warning",
        reason="AnnotationNotUnderstood",
    )


def _host_network(ref: Ref) -> Problem:
    return Problem(
        object=str(ref),
        field=_FIELD,
        message="the pod shares the network namespace of the host, which can't be left out",
        mend="leave the annotation out, or hostNetwork",
        severity="warning",
        reason="OptOutNotPossible",
    )
