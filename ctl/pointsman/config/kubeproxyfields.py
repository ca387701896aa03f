"""Every field of KubeProxyConfiguration v1alpha1, and what becomes of it here. Pure, a table.

The fields are those of staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go of Kubernetes 1.37,
which are 1.36's, and below "gone" those that older versions had. Defaults are those of
pkg/proxy/apis/config/v1alpha1/defaults.go.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pointsman.config.typed import Duration, DurationOrNanoseconds

IPTABLES, IPVS, NFTABLES = "iptables", "ipvs", "nftables"


class Sets(NamedTuple):
    """Honoured: it decides this option of `up`, by the name of click's parameter."""

    option: str


class Same(NamedTuple):
    """Nothing to do, and why: what it asks for is so anyway, or kube-proxy does not read it."""

    why: str


class Lacks(NamedTuple):
    """Not honoured: a warning, unless the value is empty, zero or kube-proxy's default."""

    why: str
    mend: str = "delete it"
    defaults: tuple[Any, ...] = ()


class Field(NamedTuple):
    """`modes`: those in which kube-proxy reads it; () is all."""

    path: str
    type: Any
    effect: Sets | Same | Lacks
    modes: tuple[str, ...] = ()


_MARK = "no packet is marked, for sockets are translated before there is one"
_SOURCE = (
    "a socket's source address is never rewritten; of clients outside it is for endpoints on other "
    "nodes only (--dispatch snat)"
)
_SYNC = "each change is written when it comes, and only what differs"
_LOCAL = "whoever has a socket in the served cgroup is local"
_WINDOWS = "kube-proxy reads it on Windows only"
_RANDOM = (
    "each socket's connection gets one of the endpoints at random, a client outside one by a "
    "Maglev table"
)
_IPVS_STATE = "a translated connection has no state in IPVS"
_CONNTRACK = "conntrack's settings are left alone, and translated sockets need no entry of NAT"
_KLOG = "the log is lines of text on standard error"
_GONE = "no kube-proxy of today reads it"

_ANSWER = "see that endpoints can answer clients directly, then delete it"
_ROUTE_BACK = Lacks(_SOURCE, _ANSWER)


def _sysctl(name: str, *defaults: int) -> Lacks:
    return Lacks(_CONNTRACK, f"set sysctl {name} if other traffic needs it", defaults)


FIELDS = (
    Field("clientConnection.kubeconfig", str, Sets("kubeconfig")),
    Field("clientConnection.acceptContentTypes", str, Same("the agent speaks JSON")),
    Field("clientConnection.contentType", str, Same("the agent speaks JSON")),
    Field(
        "clientConnection.qps",
        float,
        Lacks("requests are few, and not limited on this side", defaults=(5,)),
    ),
    Field(
        "clientConnection.burst",
        int,
        Lacks("requests are few, and not limited on this side", defaults=(10,)),
    ),
    Field("hostnameOverride", str, Sets("node_name")),
    # Pointsman's own idea of it is the Node object's.
    Field(
        "bindAddress",
        str,
        Lacks(
            "this node's primary addresses are the Node object's; of this only the family counts, "
            "for the defaults of healthzBindAddress and metricsBindAddress",
            "see that the Node object has that InternalIP first, then delete it",
            ("0.0.0.0", "::"),  # noqa: S104 - values of a file, nothing is bound to them
        ),
    ),
    Field("healthzBindAddress", str, Sets("healthz_bind_address")),
    Field("metricsBindAddress", str, Sets("metrics_bind_address")),
    Field(
        "bindAddressHardFail",
        bool,
        Lacks("an address that is taken is tried again, and never ends the agent"),
    ),
    Field(
        "enableProfiling",
        bool,
        Lacks("there is no /debug/pprof", "profile the process, with py-spy for example"),
    ),
    Field("showHiddenMetricsForVersion", str, Lacks("no metric is hidden")),
    Field("mode", str, Same("sockets are translated instead; it decides defaults of other fields")),
    Field("nodePortAddresses", list[str], Sets("nodeport_addresses")),
    Field("iptables.localhostNodePorts", bool, Sets("localhost_nodeports"), (IPTABLES,)),
    Field("iptables.masqueradeAll", bool, _ROUTE_BACK, (IPTABLES, IPVS)),
    Field("iptables.masqueradeBit", int, Lacks(_MARK, defaults=(14,)), (IPTABLES, IPVS)),
    Field("iptables.syncPeriod", Duration, Lacks(_SYNC, defaults=(30,)), (IPTABLES,)),
    Field("iptables.minSyncPeriod", Duration, Lacks(_SYNC, defaults=(1,)), (IPTABLES,)),
    Field("ipvs.syncPeriod", Duration, Lacks(_SYNC, defaults=(30,)), (IPVS,)),
    Field("ipvs.minSyncPeriod", Duration, Lacks(_SYNC), (IPVS,)),
    Field("ipvs.scheduler", str, Lacks(_RANDOM), (IPVS,)),
    Field("ipvs.excludeCIDRs", list[str], Same("nothing in IPVS is touched"), (IPVS,)),
    Field(
        "ipvs.strictARP",
        bool,
        Lacks(
            "no address is put on a device, so arp_ignore and arp_announce are left alone",
            "set these sysctls if something else, such as MetalLB, needs them",
        ),
        (IPVS,),
    ),
    Field("ipvs.tcpTimeout", Duration, Lacks(_IPVS_STATE), (IPVS,)),
    Field("ipvs.tcpFinTimeout", Duration, Lacks(_IPVS_STATE), (IPVS,)),
    Field("ipvs.udpTimeout", Duration, Lacks(_IPVS_STATE), (IPVS,)),
    Field("nftables.masqueradeAll", bool, _ROUTE_BACK, (NFTABLES,)),
    Field("nftables.masqueradeBit", int, Lacks(_MARK, defaults=(14,)), (NFTABLES,)),
    Field("nftables.syncPeriod", Duration, Lacks(_SYNC, defaults=(30,)), (NFTABLES,)),
    Field("nftables.minSyncPeriod", Duration, Lacks(_SYNC, defaults=(1,)), (NFTABLES,)),
    Field("detectLocalMode", str, Same(_LOCAL)),
    Field("detectLocal.bridgeInterface", str, Same(_LOCAL)),
    Field("detectLocal.interfaceNamePrefix", str, Same(_LOCAL)),
    Field("clusterCIDR", str, Same(_LOCAL)),
    Field(
        "oomScoreAdj",
        int,
        Lacks(
            "the agent leaves its own score alone, and the kernel balances on without it",
            "set OOMScoreAdjust= in its systemd unit, or a QoS class for its pod",
            (-999,),
        ),
    ),
    Field("conntrack.maxPerCore", int, _sysctl("net.netfilter.nf_conntrack_max", 32768)),
    Field("conntrack.min", int, _sysctl("net.netfilter.nf_conntrack_max", 131072)),
    Field(
        "conntrack.tcpEstablishedTimeout",
        Duration,
        Sets("conntrack_tcp_timeout_established"),
    ),
    Field(
        "conntrack.tcpCloseWaitTimeout",
        Duration,
        Lacks(
            "a connection that one end has closed is kept like an open one, until both have",
            defaults=(3600,),
        ),
    ),
    Field("conntrack.tcpBeLiberal", bool, _sysctl("net.netfilter.nf_conntrack_tcp_be_liberal")),
    Field("conntrack.udpTimeout", Duration, Sets("conntrack_udp_timeout")),
    Field("conntrack.udpStreamTimeout", Duration, Sets("conntrack_udp_timeout_stream")),
    Field("configSyncPeriod", Duration, Lacks("watches tell of every change", defaults=(900,))),
    Field(
        "featureGates",
        dict[str, bool],
        Lacks("Pointsman has no feature gates: what it does is in docs/services.md"),
    ),
    Field("logging.format", str, Lacks(_KLOG, defaults=("text",))),
    Field("logging.flushFrequency", DurationOrNanoseconds, Same("each line is written at once")),
    Field("logging.verbosity", int, Sets("verbose")),
    Field("logging.vmodule", list[Any], Lacks("the level is one for all", "use -v instead")),
    Field("logging.options.text.splitStream", bool, Lacks(_KLOG)),
    Field("logging.options.text.infoBufferSize", str | int, Lacks(_KLOG, defaults=("0",))),
    Field("logging.options.json.splitStream", bool, Lacks(_KLOG)),
    Field("logging.options.json.infoBufferSize", str | int, Lacks(_KLOG, defaults=("0",))),
    Field("winkernel.networkName", str, Same(_WINDOWS)),
    Field("winkernel.sourceVip", str, Same(_WINDOWS)),
    Field("winkernel.enableDSR", bool, Same(_WINDOWS)),
    Field("winkernel.rootHnsEndpointName", str, Same(_WINDOWS)),
    Field("winkernel.forwardHealthCheckVip", bool, Same(_WINDOWS)),
    Field("windowsRunAsService", bool, Same(_WINDOWS)),
    Field("portRange", str, Same("the mode userspace alone used it; it never was the NodePorts'")),
    # gone
    Field("udpIdleTimeout", Duration, Lacks(_GONE)),
    Field("resourceContainer", str, Lacks(_GONE)),
    Field("conntrack.max", int, _sysctl("net.netfilter.nf_conntrack_max")),
)
