"""NodePort traffic through one node on one CPU: who forwards how many packets a second.

    generator ─ wire ═ eth0 (the node under test) ═ wire ─ counted and dropped

Frames are made in the kernel by BPF_PROG_TEST_RUN with live frames, because a sender of packets
would be the bottleneck itself. The node gives each of them to one of ten endpoints on other nodes,
by a route over the same device.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pointsman import abi, bpf
from pointsman.bpf import _libbpf, _RunOpts
from pointsman.devices import Packets
from pointsman.pins import Sizes
from pointsman.values import UDP, Entry, Frontend, Outside, PortName, to_address
from tests.bench.report import ratio, show
from tests.support.packetlab import PacketLab

_C = abi.constants()
NODE, CLIENT, GATEWAY = "192.0.2.11", "198.51.0.1", "192.0.2.1"
NODE_MAC, WIRE_MAC = "02:00:00:00:00:11", "02:00:00:00:00:01"
ENDPOINTS = [f"10.244.2.{i}" for i in range(1, 11)]
NODE_PORT, TARGET = 30080, 8080
_LIVE_FRAMES = 1 << 1
_BATCH = 64
SIZES = Sizes(services=1024, slots=2048, endpoints=1024, lines=1024)
#: kube-proxy's nftables mode, as far as a packet to one NodePort with ten endpoints passes it.
RULES = """
table ip kube {
  map ports {
    type inet_proto . inet_service : verdict
    elements = { udp . %(port)s : goto external }
  }
  map ips {
    type ipv4_addr . inet_proto . inet_service : verdict
  }
  set nodes {
    type ipv4_addr
    elements = { %(node)s }
  }
  chain marking {
    meta mark set meta mark or 0x4000
  }
  %(chains)s
  chain service {
    numgen random mod %(count)s vmap { %(choices)s }
  }
  chain external {
    jump marking
    goto service
  }
  chain services {
    ip daddr . meta l4proto . th dport vmap @ips
    ip daddr @nodes meta l4proto . th dport vmap @ports
  }
  chain prerouting {
    type nat hook prerouting priority dstnat
    jump services
  }
  chain masquerading {
    meta mark & 0x4000 == 0 return
    meta mark set meta mark xor 0x4000
    masquerade fully-random
  }
  chain postrouting {
    type nat hook postrouting priority srcnat
    jump masquerading
  }
  chain forward {
    type filter hook forward priority filter
    ct state invalid drop
  }
}
"""


def rules() -> str:
    numbers = range(len(ENDPOINTS))
    chains = "\n".join(
        f"chain e{i} {{ ip saddr {a} jump marking\n meta l4proto udp dnat to {a}:{TARGET}\n}}"
        for i, a in enumerate(ENDPOINTS)
    )
    choices = ", ".join(f"{i} : goto e{i}" for i in numbers)
    return RULES % {
        "port": NODE_PORT, "node": NODE, "chains": chains, "count": len(ENDPOINTS),
        "choices": choices,
    }  # fmt: skip


_COMPILE = """
import ctypes, os, sys
os.environ["BCC_KERNEL_SOURCE"] = sys.argv[1]
import bcc
from pointsman import bpf
flags = ["-isystem", "/usr/include", "-isystem", f"/usr/include/{os.uname().machine}-linux-gnu"]
module = bcc.BPF(src_file=sys.argv[2], cflags=[*flags, f'-DPINS="{sys.argv[3]}"'])
for name in ("generate", "count_back", "drop"):
    bpf.obj_pin(module.load_func(name.encode(), 6, None, 37).fd, f"{sys.argv[3]}/{name}")
"""


class Generator:
    """The frames, on the lab's thread, which stays on one CPU."""

    def __init__(self, lab: PacketLab) -> None:
        self._lab = lab
        self.pins = lab.root / "generator"
        self.pins.mkdir()
        source = Path(__file__).parent / "generator.c"
        command = [sys.executable, "-c", textwrap.dedent(_COMPILE)]
        arguments = [str(abi.source_directory()), str(source), str(self.pins)]
        subprocess.run([*command, *arguments], check=True, capture_output=True)
        self._program = bpf.obj_get(self.pins / "generate")
        self._plan, self._back = (bpf.Map.open(self.pins / n) for n in ("plan", "back"))

    def aim(self, flows: int) -> None:
        """From now on so many different flows."""
        ip = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 28, 0xFFFF, 0, 64, UDP, 0,
            socket.inet_aton(CLIENT)[:2] + bytes(2), socket.inet_aton(NODE),
        )  # fmt: skip
        total = sum(struct.unpack(">10H", ip))
        check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        frame = bytes.fromhex((NODE_MAC + WIRE_MAC).replace(":", "")) + b"\x08\x00"
        frame += ip[:10] + check.to_bytes(2, "big") + ip[12:]
        frame += struct.pack(">HHHH", 10000, NODE_PORT, 8, 0)
        self._plan.update(bytes(4), frame + struct.pack("=HIQ", 0, flows, 0)[:14])

    @property
    def back(self) -> int:
        cpus = bpf.possible_cpus()
        return sum(struct.unpack(f"={cpus}Q", self._back.lookup(bytes(4), 8 * cpus) or b""))

    def run(self, frames: int) -> tuple[float, int]:
        """Seconds that so many frames took, and how many came back."""
        index, before = self._lab.index("wire"), self.back
        data = ctypes.create_string_buffer(60)
        context = ctypes.create_string_buffer(struct.pack("=6I", 0, 60, 0, index, 0, 0), 24)
        options = _RunOpts(sz=ctypes.sizeof(_RunOpts), repeat=frames, flags=_LIVE_FRAMES)
        options.batch_size = _BATCH
        options.data_in, options.data_size_in = ctypes.addressof(data), 60
        options.ctx_in, options.ctx_size_in = ctypes.addressof(context), 24

        def work() -> float:
            began = time.perf_counter()
            result = _libbpf.bpf_prog_test_run_opts(self._program, ctypes.byref(options))
            if result < 0:
                raise OSError(ctypes.get_errno(), "live frames")
            return time.perf_counter() - began

        seconds = self._lab.on_node(work)
        time.sleep(0.05)
        return seconds, self.back - before


def build(lab: PacketLab) -> Generator:
    """The node, its way out, and the Service."""
    lab.on_node(lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}))
    lab.ip(f"""
        link set lo up
        link add eth0 address {NODE_MAC} type veth peer name wire address {WIRE_MAC}
        link set eth0 up
        link set wire up
        address add {NODE}/24 dev eth0
        neighbour add {GATEWAY} lladdr {WIRE_MAC} dev eth0 nud permanent
        route add default via {GATEWAY}
    """)
    lab.sysctl("net/ipv4/ip_forward", "1")
    lab.sysctl("net/ipv4/conf/all/rp_filter", "0")
    lab.sysctl("net/ipv4/conf/eth0/rp_filter", "0")
    generator = Generator(lab)
    lab.ip(f"link set dev wire xdpdrv pinned {generator.pins / 'count_back'}")
    lab.on_node(
        lambda: subprocess.run(
            ["ethtool", "-K", "eth0", "gro", "on"], check=True, capture_output=True
        )
    )
    lab.serve_device("eth0", ("DEVICE_NODE", "DEVICE_XDP"), (NODE,))
    members = tuple(sorted((to_address(a), TARGET) for a in ENDPOINTS))
    places = (_C["SLOT_ELSEWHERE"],) * len(members)
    owner = PortName("default", "web", "p")
    outside = Outside(members, places, 0, _C["PACKETS_OUTSIDE"], ())
    lab.set(
        "web",
        Entry(
            Frontend(to_address("0.0.0.0"), NODE_PORT, UDP), owner, members,
            flags=_C["SERVICE_NODE_PORT"], places=places, outside=outside,
        ),
        Entry(
            Frontend(to_address(NODE), 0, 0), PortName("", "node/a", ""), flags=_C["SERVICE_NODE"]
        ),
    )  # fmt: skip
    return generator


def arms(lab: PacketLab, generator: Generator) -> dict[str, Callable[[], None]]:
    """What makes the node each of those compared."""

    def program(path: Path | None) -> None:
        lab.ip("link set dev eth0 xdp off")
        if path:
            lab.ip(f"link set dev eth0 xdpdrv pinned {path}")

    def nft(text: str) -> None:
        lab.on_node(lambda: subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True))

    def clean() -> None:
        nft("flush ruleset")
        lab.forget()
        first, last = Packets().snat_ports
        lab.configure(first_port=first, last_port=last)

    def drop() -> None:
        clean()
        program(generator.pins / "drop")

    def send() -> None:
        clean()
        program(generator.pins / "generate")

    def pointsman() -> None:
        clean()
        program(lab.programs / "xdp_ingress")

    def nftables() -> None:
        clean()
        program(None)
        nft(rules())

    return {"drop": drop, "send": send, "pointsman": pointsman, "nftables": nftables}


def packets(quick: bool) -> dict[str, object]:
    """Packets a second from outside to a NodePort: XDP beside nftables, in turns.

    Live frames of 60 bytes, UDP, one CPU, ten endpoints on other nodes. "drop" is the floor: the
    generator, and XDP that drops everything; "send" writes headers and sends all of it back.
    """
    if not shutil.which("nft") or not shutil.which("ethtool"):
        sys.exit("needs nft and ethtool")
    found: dict[str, object] = {}
    lab = PacketLab("pm_bench_packets", SIZES)
    try:
        generator = build(lab)
        sides = arms(lab, generator)
        for label, flows, frames in (
            ("64 flows", 64, 2_000_000),
            ("50,000 flows", 50_000, 2_000_000),
            ("all new flows", 40_000 * 60_000, 300_000),
        ):
            times: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(3 if quick else 7):
                for name, begin in sides.items():
                    begin()
                    generator.aim(flows)
                    if flows <= 50_000:
                        generator.run(max(4 * flows, 20_000))  # the flows are made
                    seconds, back = generator.run(frames)
                    done = frames if name == "drop" else back
                    if done < frames // 2:
                        print(f"  {label}, {name}: {done} of {frames} came back", flush=True)
                    times[name].append(seconds / max(done, 1) * 1e9)
            found[label] = {name: median(each) for name, each in times.items()}
            for name, each in times.items():
                middle = median(each)
                print(f"  {label}, {name}: {middle:.0f} ns a packet, {1e3 / middle:.2f} Mpps")
            net = median(times["pointsman"]) - median(times["drop"])
            print(f"  {label}: net of the floor a packet costs {net:.0f} ns")
            bar = {"64 flows": "≥ 5", "50,000 flows": "≥ 4"}.get(label, "")
            show(f"{label}: Pointsman ÷ nftables, packets a second",
                 ratio(times["nftables"], times["pointsman"]), bar)  # fmt: skip
    finally:
        lab.close()
    return found


BENCHES = {"packets": packets}
