"""What to do, in which order, so that no moment is without a proxy. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: The label of a node whose kube-proxy is gone.
LABEL = "pointsman.io/kube-proxy"
_UNIT = re.compile(r"/([^/]+\.service)(?:/|$)")
_DAEMON_SET = "kubectl -n kube-system patch daemonset kube-proxy --type merge -p"
_AFFINITY = (
    '{"spec":{"template":{"spec":{"affinity":{"nodeAffinity":{'
    '"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":'
    f'[{{"key":"{LABEL}","operator":"NotIn","values":["retired"]}}]}}]}}}}}}}}}}}}}}'
)


@dataclass(frozen=True, slots=True)
class Running:
    """A process of kube-proxy. `unit` is the systemd unit it belongs to, "" if it is in a pod, or
    was started by hand; `program` its path, as it sees it."""

    pid: int
    unit: str
    in_pod: bool
    program: str


@dataclass(frozen=True, slots=True)
class Step:
    """What, with which commands, and how to see that it is done."""

    what: str
    commands: tuple[str, ...]
    check: str


def running_as(pid: int, cgroup: str, program: str) -> Running:
    """`cgroup` is /proc/PID/cgroup."""
    in_pod = "kubepods" in cgroup
    unit = _UNIT.search(cgroup)
    return Running(pid, unit[1] if unit and not in_pod else "", in_pod, program)


def retire(found: Sequence[Running], node: str) -> list[Step]:
    """From both to Pointsman alone."""
    unit = next((each.unit for each in found if each.unit), "")
    by_hand = [each for each in found if not each.unit and not each.in_pod]
    steps = [
        Step(
            "Let connections end that are older than Pointsman's start, or restart the pods that "
            "keep some, UDP sockets above all; then wait two minutes more",
            (),
            "what conntrack still has of Services is old, or ends soon",
        )
    ]
    if unit:
        stop = Step(
            "Stop kube-proxy. Its rules stay, and are not followed up any more",
            (f"systemctl disable --now {unit}",),
            "'pointsman takeover' still has no differences",
        )
    elif by_hand:
        stop = Step(
            "Stop kube-proxy, and whatever starts it. Its rules stay, and are not followed up",
            tuple(f"kill {each.pid}" for each in by_hand),
            "'pointsman takeover' still has no differences",
        )
    elif found:
        stop = Step(
            "Take kube-proxy's pod off this node. The first command is for all nodes, once: it "
            "takes nothing off a node without the label. A node affinity that the DaemonSet has "
            "already is replaced by it: then add the expression by hand. The rules stay, and are "
            "not followed up any more",
            (f"{_DAEMON_SET} '{_AFFINITY}'", f"kubectl label node {node} {LABEL}=retired"),
            f"'kubectl -n kube-system get pods -l k8s-app=kube-proxy --field-selector "
            f"spec.nodeName={node}' shows none; 'pointsman takeover' still has no differences",
        )
    else:
        stop = Step(
            "kube-proxy does not run here any more: see that nothing starts it again",
            (),
            "",
        )
    program = next((each.program for each in found if each.program and not each.in_pod), "")
    steps += [
        stop,
        Step(
            "See that Services are followed up: a pod that is made anew is found by its Service",
            ("pointsman verify",),
            "no differences",
        ),
        Step(
            "Remove kube-proxy's rules, with its own program or image (privileged, on the host's "
            "network). Connections that still live by them end. Conntrack is left as it is",
            (f"{program or 'kube-proxy'} --cleanup",),
            "'pointsman takeover' says that kube-proxy serves nothing, 'pointsman status' is "
            "healthy",
        ),
    ]
    return steps


def start(node: str) -> list[Step]:
    """Has kube-proxy run beside Pointsman again."""
    return [
        Step(
            "Have Pointsman use ports of its own for health and metrics, not 10256 and 10249",
            (),
            "nothing listens at 10256",
        ),
        Step(
            "Start kube-proxy: its pod, or its unit, whichever it was",
            (f"kubectl label node {node} {LABEL}-", "systemctl enable --now kube-proxy.service"),
            "'pointsman takeover --back' has no differences",
        ),
    ]


def back() -> list[Step]:
    """From both to kube-proxy alone."""
    return [
        Step(
            "Stop Pointsman's agent: its unit, or by turning the DaemonSet into the one that "
            "unloads (docs/kubernetes.md, Remove), which does the next step, too",
            ("systemctl disable --now pointsman.service",),
            "the kernel goes on with the last state",
        ),
        Step(
            "Take the programs out of the kernel. Open connections of this node's programs stay, "
            "those of clients outside end that Pointsman had taken",
            ("pointsman unload",),
            "new connections go by kube-proxy's rules",
        ),
    ]
