"""The programs by name, with the kernel's numbers for them (include/uapi/linux/bpf.h)."""

from __future__ import annotations

from dataclasses import dataclass

_CGROUP_SOCK, _CGROUP_SOCK_ADDR, _SOCK_OPS, _XDP, _SCHED_CLS = 9, 18, 13, 6, 3


@dataclass(frozen=True, slots=True)
class Hook:
    """One program: its function in bpf/, its type and where it attaches."""

    name: str
    program_type: int
    attach_type: int


@dataclass(frozen=True, slots=True)
class Link:
    """One hook: whether its link is there, what it runs, and on which cgroup (inode number)."""

    hook: str
    program: int | None = None
    cgroup: int = 0
    current: bool = False


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """One pin: on which device (ifindex 0: it is gone, or in another namespace) which program (id)
    runs, as a link or as a filter of a clsact qdisc."""

    pin: str
    hook: str
    name: str
    index: int
    program: int
    is_filter: bool = False
    current: bool = False


#: In the order in which links are made and flipped to new programs: whatever reads the records
#: first, what writes them last. The other way round, a new record meets an old reader.
HOOKS = (
    Hook("sock_ops", _SOCK_OPS, 3),
    Hook("sock_release", _CGROUP_SOCK, 34),
    Hook("getpeername4", _CGROUP_SOCK_ADDR, 29),
    Hook("getpeername6", _CGROUP_SOCK_ADDR, 30),
    Hook("recvmsg4", _CGROUP_SOCK_ADDR, 19),
    Hook("recvmsg6", _CGROUP_SOCK_ADDR, 20),
    Hook("sendmsg4", _CGROUP_SOCK_ADDR, 14),
    Hook("sendmsg6", _CGROUP_SOCK_ADDR, 15),
    Hook("connect4", _CGROUP_SOCK_ADDR, 10),
    Hook("connect6", _CGROUP_SOCK_ADDR, 11),
    Hook("post_bind4", _CGROUP_SOCK, 12),
    Hook("post_bind6", _CGROUP_SOCK, 13),
)

#: On devices: XDP takes what comes from outside, TC what XDP left, and what goes out.
XDP_INGRESS = Hook("xdp_ingress", _XDP, 37)
TC_INGRESS = Hook("tc_ingress", _SCHED_CLS, 46)
TC_EGRESS = Hook("tc_egress", _SCHED_CLS, 47)
DEVICE_HOOKS = (XDP_INGRESS, TC_INGRESS, TC_EGRESS)
#: Run by the agent as HELPERS are, loaded with the programs for packets.
SWEEP = Hook("sweep", _XDP, 37)

#: Tried in this order: what the kernel lacks costs a feature, not the load.
FEATURES: tuple[tuple[str, ...], ...] = (
    ("HAVE_COMPARE_AND_SWAP", "HAVE_SET_RETVAL", "HAVE_MPTCP"),
    ("HAVE_COMPARE_AND_SWAP", "HAVE_SET_RETVAL"),
    ("HAVE_COMPARE_AND_SWAP",),
    (),
)
#: What is lost without one of them, and the first Linux that has it.
LOST = {
    "HAVE_SET_RETVAL": "connects, datagrams and binds that are refused all fail with EPERM "
    "(bpf_set_retval() is there from Linux 5.18 on)",
    "HAVE_COMPARE_AND_SWAP": "no endpoint is ejected, and every record of a connected socket "
    "is in sockets_overflow, of which one network namespace may take a quarter (programs compare "
    "and swap from Linux 5.12 on)",
    "HAVE_MPTCP": "getpeername() of an MPTCP socket tells the endpoint, not the Service "
    "(bpf_skc_to_mptcp_sock() is there from Linux 5.19 on)",
}
#: bpf_set_retval() and bpf_skc_to_mptcp_sock() by number, for a program of that type.
SET_RETVAL = (_CGROUP_SOCK_ADDR, 187)
SKC_TO_MPTCP_SOCK = (_CGROUP_SOCK_ADDR, 196)
#: bpf_ktime_get_coarse_ns() likewise: where it is not, nothing for packets need be compiled.
COARSE_CLOCK = (_SCHED_CLS, 160)
NO_PACKETS = (
    "they need bpf_ktime_get_coarse_ns() and compare-and-swap, which are there from Linux 5.12 on"
)

#: Run by the agent with BPF_PROG_TEST_RUN, attached to nothing.
HELPERS = (Hook("set_generation", _XDP, 37), Hook("merge_load", _XDP, 37))
