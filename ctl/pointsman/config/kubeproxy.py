"""KubeProxyConfiguration, kubeproxy.config.k8s.io/v1alpha1: kube-proxy's file, as it is. Pure.

Each field is honoured, needs nothing, or is named in a warning: `kubeproxyfields.FIELDS` is the
table of them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from pointsman.config.configuration import BadConfiguration, Configuration, Note
from pointsman.config.kubeproxyfields import (
    FIELDS,
    IPTABLES,
    IPVS,
    NFTABLES,
    Field,
    Lacks,
    Same,
    Sets,
)
from pointsman.config.typed import flatten
from pointsman.events import Problem
from pointsman.names import show

KIND = "KubeProxyConfiguration"
API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"

_MODES = (IPTABLES, IPVS, NFTABLES)
_TYPES = {"kind": str, "apiVersion": str} | {field.path: field.type for field in FIELDS}
#: Words in nodePortAddresses since Kubernetes 1.37; "primary" is older.
_WORDS = {"all": ("0.0.0.0/0", "::/0"), "localhost": ("127.0.0.0/8", "::1/128")}
_PRIMARY = "primary"
#: For connections from outside: those between sockets of this node need no conntrack.
_TIMEOUTS = tuple(
    (field.path, field.effect.option)
    for field in FIELDS
    if isinstance(field.effect, Sets) and field.path.startswith("conntrack.")
)
#: Kubernetes' convention for the levels of klog: from here on they are for debugging.
_DEBUG = 4


def read(document: Mapping[str, object]) -> Configuration:
    """Raises BadConfiguration, which names every field that is of a wrong type, and the mode if
    kube-proxy has no such."""
    found = flatten(document, _TYPES)
    values = found.values
    mode, faults = _mode(values.get("mode", ""))
    if faults := [*found.faults, *faults]:
        raise BadConfiguration(*faults)
    problems = [
        Problem(
            "kube-proxy has no such field",
            f"write {near}" if near else "delete it",
            field=path,
            severity="warning",
        )
        for path, near in found.unknown
    ]
    notes = []
    for field in FIELDS:
        told = _told(field, values[field.path], mode) if field.path in values else None
        if isinstance(told, Problem):
            problems.append(told)
        elif told:
            notes.append(told)
    options, fields = _options(values, mode)
    texts = values.get("nodePortAddresses", [])
    for path, option in _TIMEOUTS:
        if (limit := values.get(path)) and limit > 0:  # else it is left as it is
            options[option], fields[option] = f"{round(limit) or 1}s", path
    addresses, more = _node_port_addresses(texts, mode)
    if addresses:
        options["nodeport_addresses"] = addresses
        fields["nodeport_addresses"] = "nodePortAddresses" if texts else "mode"
    return Configuration(KIND, options, fields, (*problems, *more), tuple(notes))


def _mode(mode: object) -> tuple[str, list[Problem]]:
    """The mode whose sections and defaults count."""
    if mode in ("", "userspace"):  # gone since Kubernetes 1.26; it had iptables' defaults
        return IPTABLES, []
    if isinstance(mode, str) and mode in _MODES:
        return mode, []
    mend = f"write {', '.join(_MODES)} or nothing"
    return IPTABLES, [Problem(f"kube-proxy has no mode {show(mode)} on Linux", mend, field="mode")]


def _told(field: Field, value: object, mode: str) -> Note | Problem | None:
    """What an operator must know of a field that is set: why it needs nothing, or has no effect."""
    if not value:
        return None
    if field.modes and mode not in field.modes:
        return Note(field.path, f"kube-proxy does not read it in mode {mode}")
    effect = field.effect
    if isinstance(effect, Same):
        return Note(field.path, effect.why)
    if isinstance(effect, Lacks) and value not in effect.defaults:
        message = f"it has no effect: {effect.why}"
        return Problem(message, effect.mend, field=field.path, severity="warning")
    return None


def _options(values: Mapping[str, Any], mode: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that the file decides, and the field that each is from.

    kube-proxy follows an API server and serves health and metrics, whatever its file says.
    """
    ipv6 = ":" in values.get("bindAddress", "")
    options: dict[str, Any] = {
        "kubernetes": True,
        "healthz_bind_address": _bind(
            values.get("healthzBindAddress", ""),
            "::" if ipv6 else "0.0.0.0",  # noqa: S104 - kube-proxy's default, for probes
            10256,
        ),
        "metrics_bind_address": _bind(
            values.get("metricsBindAddress", ""), "::1" if ipv6 else "127.0.0.1", 10249
        ),
        # kube-proxy has NodePorts at 127.0.0.1 in mode iptables only.
        "localhost_nodeports": mode == IPTABLES and values.get("iptables.localhostNodePorts", True),
    }
    fields = {
        "kubernetes": "kind",
        "healthz_bind_address": "healthzBindAddress",
        "metrics_bind_address": "metricsBindAddress",
        "localhost_nodeports": "iptables.localhostNodePorts" if mode == IPTABLES else "mode",
    }
    verbosity = values.get("logging.verbosity")
    for path, option, value in (
        ("clientConnection.kubeconfig", "kubeconfig", values.get("clientConnection.kubeconfig")),
        # As kube-proxy makes a node's name of it.
        ("hostnameOverride", "node_name", values.get("hostnameOverride", "").strip().lower()),
        ("logging.verbosity", "verbose", verbosity >= _DEBUG if verbosity else None),
    ):
        if value or value is False:
            options[option], fields[option] = value, path
    return options, fields


def _bind(text: str, default: str, port: int) -> str:
    """ADDRESS:PORT, or [ADDRESS]:PORT. Left empty it is kube-proxy's default, and not "off"."""
    try:
        address = ipaddress.ip_address(text.strip("[]") or default)
    except ValueError:
        return text  # has a port, or is wrong: the option says so
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _node_port_addresses(texts: list[str], mode: str) -> tuple[list[str], list[Problem]]:
    """For --nodeport-addresses; empty is all. Left out it means "primary" in mode nftables."""
    if not texts and mode == NFTABLES:
        return [_PRIMARY], []
    if _PRIMARY not in texts:
        return [each for text in texts for each in _WORDS.get(text, (text,))], []
    others = [text for text in texts if text != _PRIMARY]
    if not others:
        return [_PRIMARY], []
    message = f"NodePorts do not answer at {show(', '.join(others))}: {_PRIMARY!r} stands alone"
    mend = f"write CIDRs in the place of {_PRIMARY}, or delete the others"
    return [_PRIMARY], [Problem(message, mend, field="nodePortAddresses", severity="warning")]
