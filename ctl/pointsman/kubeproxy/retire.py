"""What to do, in which order, so that no moment is without a proxy. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

#: The label of a node whose kube-proxy is gone.
LABEL = "pointsman.io/kube-proxy"
_UNIT = re.compile(r"/([^/]+\.service)(?:/|$)")
_IN_POD = re.compile(rb"(?:^|\0)KUBERNETES_SERVICE_HOST=")
_KUBECTL = "kubectl -n kube-system"
_AFFINITY = (
    '{"spec":{"template":{"spec":{"affinity":{"nodeAffinity":{'
    '"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":'
    f'[{{"key":"{LABEL}","operator":"NotIn","values":["retired"]}}]}}]}}}}}}}}}}}}}}'
)
_TABLES = {"IPv4": "ip", "IPv6": "ip6"}
_CLEANUP = "kube-proxy-cleanup"
_IMAGE = (
    f"{_KUBECTL} get daemonset kube-proxy -o jsonpath='{{.spec.template.spec.containers[0].image}}'"
)

#: (mode, family) as ("nftables", "IPv4").
Rules = Collection[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Running:
    """A process. `unit` is the systemd unit it belongs to, "" if it is in a pod, or was started by
    hand; `program` its path, as it sees it."""

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


def running_as(pid: int, cgroup: str, program: str, environment: bytes = b"") -> Running:
    """`cgroup` and `environment` are /proc/PID/cgroup and environ. Seen from a container, the
    former may say nothing."""
    in_pod = "kubepods" in cgroup or bool(_IN_POD.search(environment))
    unit = _UNIT.search(cgroup)
    return Running(pid, unit[1] if unit and not in_pod else "", in_pod, program)


def retire(found: Sequence[Running], node: str, rules: Rules) -> list[Step]:
    """From both to Pointsman alone. `rules` are what kube-proxy has some of."""
    return [
        Step(
            "Let connections end that are older than Pointsman's start, or restart the pods that "
            "keep some, UDP sockets above all; then wait two minutes more",
            (),
            "the last of them ended two minutes ago",
        ),
        _stop(found, node),
        Step(
            "See that Services are followed up: a pod that is made anew is found by its Service",
            ("pointsman verify",),
            "no differences",
        ),
        _clean(found, node, rules),
    ]


def _stop(found: Sequence[Running], node: str) -> Step:
    """Of several the one that would come again."""
    check = "'pointsman takeover' still has no differences"
    stay = "Its rules stay, and are not followed up any more"
    if units := tuple(each.unit for each in found if each.unit):
        return Step(f"Stop kube-proxy. {stay}", (f"systemctl disable --now {units[0]}",), check)
    if any(each.in_pod for each in found):
        return Step(
            "Take kube-proxy's pod off this node. The first command is for the cluster, once: each "
            "kube-proxy restarts, and only nodes with the label have none. It replaces a node "
            "affinity that the DaemonSet has already: then add the expression by hand. If the pod "
            "is static, move its manifest out of the kubelet's directory instead. "
            f"{stay}",
            (
                f"{_KUBECTL} patch daemonset kube-proxy --type merge -p '{_AFFINITY}'",
                f"kubectl label node {node} {LABEL}=retired",
            ),
            f"'{_KUBECTL} get pods -l k8s-app=kube-proxy --field-selector spec.nodeName={node}' "
            f"shows none; {check}",
        )
    if found:
        kills = tuple(f"kill {each.pid}" for each in found)
        return Step(f"Stop kube-proxy, and whatever starts it. {stay}", kills, check)
    return Step(
        "No process kube-proxy is here: see that none starts again, and that none is part of "
        "another program, as of k3s (--disable-kube-proxy)",
        (),
        check,
    )


def _clean(found: Sequence[Running], node: str, rules: Rules) -> Step:
    """A table of nftables is kube-proxy's alone; of the others it knows best what is its own."""
    program = next((each.program for each in found if each.program and not each.in_pod), "")
    how, commands = "", tuple[str, ...]()
    if all(mode == "nftables" for mode, _ in rules):
        commands = tuple(f"nft delete table {_TABLES[family]} kube-proxy" for _, family in rules)
    elif program:
        commands = (f"{program} --cleanup",)
    else:
        how = ", by a pod of its image; if kube-proxy is a program of this node, by its --cleanup"
        overrides = (
            f'{{"spec":{{"nodeName":"{node}","hostNetwork":true,"containers":[{{"name":'
            f'"{_CLEANUP}","securityContext":{{"privileged":true}}}}]}}}}'
        )
        commands = (
            f'{_KUBECTL} run {_CLEANUP} --restart=Never --image="$({_IMAGE})" '
            f"--override-type=strategic --overrides='{overrides}' --command -- "
            "kube-proxy --cleanup",
        )
    check = (
        "'pointsman takeover' exits with 12, for kube-proxy serves nothing; 'pointsman status' is "
        "healthy"
    )
    if how:
        check += f"; then '{_KUBECTL} delete pod {_CLEANUP}'"
    return Step(
        f"Remove kube-proxy's rules{how}. Connections that still live by them may end. Conntrack "
        "is left as it is",
        commands,
        check,
    )


def start(node: str) -> list[Step]:
    """Has kube-proxy run beside Pointsman again."""
    return [
        Step(
            "Have Pointsman use ports of its own for health and metrics, not 10256 and 10249",
            (),
            "nothing listens at 10256",
        ),
        Step(
            "Start kube-proxy: its pod (the first command) or its unit (the second)",
            (f"kubectl label node {node} {LABEL}-", "systemctl enable --now kube-proxy.service"),
            "'pointsman takeover --back' has no differences",
        ),
    ]


def back(agent: Running | None) -> list[Step]:
    """From both to kube-proxy alone."""
    loaded = "'pointsman status' exits with 11; new connections go by kube-proxy's rules"
    ends = (
        "Open connections of this node's programs stay; those of clients outside that Pointsman "
        "had taken have a minute to end"
    )
    if agent and agent.in_pod:
        return [
            Step(
                "On all nodes alike: turn Pointsman's DaemonSet into the one that unloads, see "
                f"docs/kubernetes.md, Remove. {ends}",
                (),
                loaded,
            )
        ]
    steps = [
        Step(
            f"Take the programs out of the kernel. {ends}", ("pointsman unload --drain 60",), loaded
        )
    ]
    if agent:
        stop = f"systemctl disable --now {agent.unit}" if agent.unit else f"kill {agent.pid}"
        steps.insert(
            0,
            Step(
                f"Stop Pointsman's agent{'' if agent.unit else ', and whatever starts it'}",
                (stop,),
                "'pointsman status' says that it is not running; the kernel goes on with the last "
                "state",
            ),
        )
    return steps
