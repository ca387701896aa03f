"""Devices as they come, go and change: what is attached there, and what the maps say of them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointsman import abi, bpf, host
from pointsman.attach import DeviceLinks
from pointsman.deviceproblems import Outcome
from pointsman.devices import AUTO, NO_ADDRESS, NODE, POD, XDP, Packets, Seen, Served, Surrounding
from pointsman.devicewatch import DevicesNow, DeviceWatch
from pointsman.errors import PointsmanError
from pointsman.netlink import devices, filters, neighbours
from pointsman.netns import found_in
from pointsman.pins import Loaded, Pins
from pointsman.socketlinks import SocketLinks
from pointsman.values import Address, to_address
from tests.kernel.test_netns import another_namespace, cookie_of
from tests.support.agents import AgentProcess, manifest, node_of, service_of, slice_of
from tests.support.kernel import LINUX, SMALL, TC, needs_linux, run, until

pytestmark = pytest.mark.kernel
_device = abi.layouts()["device"]


@pytest.fixture(scope="module")
def loaded(kernel: None) -> Iterator[Loaded]:
    """The programs for packets, pinned, attached to nothing."""
    needs_linux(5, 12, "compare-and-swap")
    pins = Pins(Path("/sys/fs/bpf") / f"pm_devices_{os.getpid()}", SMALL)
    host.mount_bpffs(pins.root)
    found = pins.load(packets=True)
    assert not found.packets_error, found.packets_error
    yield found
    pins.unload()


@pytest.fixture
def eth(kernel: None) -> Iterator[str]:
    """A device of the node with an address; its other end is in the same namespace."""
    with veth("pme0"):
        run("ip", "addr", "add", "192.0.2.1/24", "dev", "pme0")
        yield "pme0"


@contextlib.contextmanager
def veth(name: str) -> Iterator[None]:
    run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
    try:
        run("ip", "link", "set", name, "up")
        run("ip", "link", "set", f"{name}p", "up")
        yield
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


class Watched:
    """A DeviceWatch on its thread, and what it told last."""

    def __init__(self, loaded: Loaded, packets: Packets, around: Surrounding) -> None:
        self.loaded = loaded
        self.root = loaded.generation.directory.parent
        self.now = DevicesNow()
        self.watch = DeviceWatch(packets, self.root, self._take)
        self.watch.want(packets, around)
        self.watch.begin(loaded.generation.programs, loaded.generation.maps)
        self._thread = threading.Thread(target=self.watch.run)
        self._thread.start()

    def _take(self, now: DevicesNow) -> None:
        self.now = now

    def close(self) -> None:
        self.watch.stop()
        self._thread.join()

    def row(self, name: str) -> dict[str, Any]:
        return next((row for row in self.now.rows if row["name"] == name), {})

    def until(self, name: str, **expected: Any) -> None:
        until(
            lambda: self.row(name) and expected.items() <= self.row(name).items(),
            f"{name} with {expected}; it is {self.now}",
        )

    def links(self) -> dict[str, int]:
        """Pin → program id, of what is on a device that is there."""
        found = DeviceLinks(self.root).present()
        return {link.pin: link.program for link in found if link.index}

    def element(self, name: str) -> dict[str, Any]:
        """The device's element of `devices`, {} if there is none."""
        with contextlib.closing(bpf.Map.open(self.loaded.generation.maps / "devices")) as opened:
            value = opened.lookup(socket.if_nametoindex(name).to_bytes(4, "little"))
        return _device.decode(value) if value else {}

    def vlans(self) -> dict[bytes, bytes]:
        with contextlib.closing(bpf.Map.open(self.loaded.generation.maps / "vlans")) as opened:
            return dict(opened.items())


@pytest.fixture
def watched(loaded: Loaded) -> Iterator[Callable[..., Watched]]:
    """`watched("pme0", …)` follows these devices; Packets' fields and `around` by name. XDP is
    asked for: `auto` has none for the devices of these tests, which are veth."""
    made: list[Watched] = []

    def make(*names: str, around: Surrounding | None = None, **fields: Any) -> Watched:
        packets = Packets(names, **{"xdp_mode": "native", **fields})
        made.append(Watched(loaded, packets, around or Surrounding()))
        return made[-1]

    yield make
    for one in made:
        one.close()
    DeviceLinks(loaded.generation.directory.parent).remove_all()


@contextlib.contextmanager
def pod_at(address: str) -> Iterator[int]:
    """The pid of a process in a network namespace whose device leads to `pmp0` here."""
    with another_namespace() as pod, veth("pmp0"):
        run("ip", "link", "set", "pmp0p", "netns", str(pod.pid))
        inside = ["nsenter", "--net", "-t", str(pod.pid), "ip"]
        run(*inside, "addr", "add", f"{address}/24", "dev", "pmp0p")
        run(*inside, "link", "set", "pmp0p", "up")
        yield pod.pid


def xdp_of(name: str) -> tuple[tuple[str, int], ...]:
    return next(one.xdp for one in devices.seen().devices if one.name == name)


def problems(found: DevicesNow) -> str:
    return "\n".join(map(str, found.problems))


# -- attaching -----------------------------------------------------------------------------------


def test_a_device_gets_xdp_tc_and_an_element(eth: str, watched: Callable[..., Watched]) -> None:
    run("ip", "addr", "add", "2001:db8::1/64", "dev", eth, "nodad")
    node = watched(eth)
    node.until(eth, xdp="native", tc=TC, served=True, addresses=["192.0.2.1", "2001:db8::1"])
    pins = {pin.partition("::")[0] for pin in node.links()}  # a filter's has more behind its name
    assert pins == {f"{h}-{eth}" for h in ("xdp_ingress", "tc_ingress", "tc_egress")}
    assert xdp_of(eth) == (("native", node.links()[f"xdp_ingress-{eth}"]),)
    element = node.element(eth)
    assert (element["flags"], element["ipv4"], element["ipv6"]) == (
        NODE,
        to_address("192.0.2.1"),
        to_address("2001:db8::1"),
    )


def test_the_default_route_s_device_is_found(eth: str, watched: Callable[..., Watched]) -> None:
    node = watched(AUTO)
    until(lambda: "no device has a default route" in problems(node.now), "the warning")
    run("ip", "route", "add", "default", "via", "192.0.2.254", "dev", eth)
    node.until(eth, served=True)
    run("ip", "route", "del", "default")
    run("ip", "address", "flush", "dev", eth, "scope", "global")
    until(lambda: not any(node.now.rows[0]["addresses"]), "another look")
    assert node.links() and node.element(eth)  # away for a moment: no reason to end connections


def test_another_s_xdp_program_stays_and_tc_serves(
    eth: str, watched: Callable[..., Watched], loaded: Loaded
) -> None:
    fd = bpf.obj_get(loaded.generation.programs / "sweep")
    foreign = bpf.program_info(fd).id
    run("ip", "link", "set", "dev", eth, "xdp", "pinned", str(loaded.generation.programs / "sweep"))
    os.close(fd)
    node = watched(eth)
    node.until(eth, xdp="none", tc=TC, served=True)
    assert f"another XDP program (id {foreign})" in problems(node.now)
    assert xdp_of(eth) == (("native", foreign),)
    run("ip", "link", "set", "dev", eth, "xdp", "off")
    node.until(eth, xdp="native")
    assert "another XDP program" not in problems(node.now)


def test_a_driver_without_xdp_is_served_by_tc(
    kernel: None, watched: Callable[..., Watched]
) -> None:
    run("ip", "link", "add", "pmb0", "type", "bridge")
    try:
        run("ip", "link", "set", "pmb0", "up")
        node = watched("pmb0")
        node.until("pmb0", xdp="none", tc=TC, served=True)
        assert "no native XDP" in problems(node.now)
        generic = watched("pmb0", xdp_mode="generic")
        generic.until("pmb0", xdp="generic")
    finally:
        run("ip", "link", "del", "pmb0")


def test_modes_change_while_it_runs(eth: str, watched: Callable[..., Watched]) -> None:
    node = watched(eth, xdp_mode="generic")
    node.until(eth, xdp="generic")
    node.watch.want(Packets((eth,), xdp_mode="native"), Surrounding())
    node.until(eth, xdp="native")
    assert [mode for mode, _ in xdp_of(eth)] == ["native"]
    node.watch.want(Packets((eth,), xdp_mode="none"), Surrounding())
    node.until(eth, xdp="none", tc=TC)
    assert xdp_of(eth) == ()


def test_settings_reach_the_programs(eth: str, watched: Callable[..., Watched]) -> None:
    node = watched(eth, snat_ports=(62000, 63000), dsr=True)
    node.until(eth, served=True)
    opened = bpf.Map.open(node.loaded.generation.maps / "packet_settings")
    found = abi.layouts()["packet_settings"].decode(opened.lookup(bytes(4)) or b"")
    opened.close()
    assert (found["first_port"], found["last_port"], found["dsr"]) == (62000, 63000, 1)
    assert (found["tcp_new"], found["tcp_open"], found["udp_open"]) == (60, 86400, 120)


def test_what_a_killed_agent_left_half_done_is_taken_over(
    eth: str, watched: Callable[..., Watched]
) -> None:
    """Between pinning a link under a passing name and giving it its own."""
    node = watched(eth)
    node.until(eth, served=True)
    before = node.links()
    node.close()
    for pin in before:
        (node.root / "links" / pin).rename(node.root / "links" / f"{pin}::next")
    again = watched(eth)
    again.until(eth, xdp="native", tc=TC, served=True)
    assert again.links() == before


# -- where XDP runs, and where it may send -------------------------------------------------------


def mac_of(name: str) -> bytes:
    return next(one.mac for one in devices.seen().devices if one.name == name)


def test_auto_leaves_a_veth_to_tc(eth: str, watched: Callable[..., Watched]) -> None:
    node = watched(eth, xdp_mode=AUTO)
    node.until(eth, xdp="none", tc=TC, served=True, problems=[])
    assert "XDP" not in problems(node.now)
    assert xdp_of(eth) == ()
    node.watch.want(Packets((eth,), xdp_mode="native"), Surrounding())
    node.until(eth, xdp="native")
    node.watch.want(Packets((eth,)), Surrounding())
    node.until(eth, xdp="none", served=True)
    assert xdp_of(eth) == ()


def test_programs_know_the_device_s_address(eth: str, watched: Callable[..., Watched]) -> None:
    node = watched(eth)
    node.until(eth, served=True)
    assert node.element(eth)["mac"] == mac_of(eth)
    run("ip", "link", "set", eth, "address", "02:00:00:00:00:77")
    until(lambda: node.element(eth)["mac"] == b"\x02\0\0\0\0\x77", "the new one")


def test_xdp_may_send_where_the_kernel_says_that_it_can(
    eth: str, watched: Callable[..., Watched], loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    """A veth takes frames if its other end has a program, too. Before Linux 6.3 none says so."""
    caplog.set_level(logging.INFO, "pointsman.agent")
    passes = str(loaded.generation.programs / "sweep")
    with veth("pmf0"):
        run("ip", "link", "set", "dev", f"{eth}p", "xdp", "pinned", passes)
        node = watched(eth, "pmf0")
        node.until("pmf0", xdp="native", served=True)
        if LINUX < (6, 3):
            until(lambda: "from Linux 6.3 on" in caplog.text, "the reason")
            assert node.element(eth)["flags"] == NODE
            return
        until(lambda: node.element(eth)["flags"] == NODE | XDP, "the flag")
        assert "from Linux 6.3 on" not in caplog.text
        assert node.element("pmf0")["flags"] == NODE
        node.watch.want(Packets((eth, "pmf0"), xdp_mode="generic"), Surrounding())
        node.until(eth, xdp="generic")
        assert node.element(eth)["flags"] == NODE


def test_the_way_to_endpoints_elsewhere_is_served(
    eth: str, watched: Callable[..., Watched]
) -> None:
    """An overlay's device, where there is one: their replies come in by it."""
    run("ip", "link", "add", "pmx0", "type", "vxlan", "id", "7", "dstport", "8472", "dev", eth)
    try:
        run("ip", "addr", "add", "10.245.1.0/32", "dev", "pmx0")
        run("ip", "link", "set", "pmx0", "up")
        run("ip", "route", "add", "10.245.2.0/24", "via", "10.245.2.0", "dev", "pmx0", "onlink")
        around = Surrounding(endpoints=frozenset({to_address("10.245.2.5")}))
        named = watched(eth, around=around)
        until(lambda: "10.245.2.5, are behind it" in problems(named.now), "the problem")
        named.close()
        run("ip", "route", "add", "default", "via", "192.0.2.254", "dev", eth)
        node = watched(AUTO, around=around, xdp_mode=AUTO)
        node.until("pmx0", xdp="none", tc=TC, served=True, addresses=["10.245.1.0"])
        assert "behind it" not in problems(node.now)
        assert "XDP" not in problems(node.now)
        run("ip", "route", "del", "10.245.2.0/24")
        node.watch.want(Packets((AUTO,)), replace(around, node_ports=(1, 2)))
        until(lambda: "1-2" not in problems(node.now) and node.row("pmx0"), "another look")
        assert node.element("pmx0")["flags"] == NODE  # away for a moment
    finally:
        run("ip", "link", "del", "pmx0")


def test_what_faces_the_cluster_is_served_without_a_default_route(
    eth: str, watched: Callable[..., Watched]
) -> None:
    """As in a VM whose default route is another device's: the Node's address is on `eth`, other
    nodes are behind a bridge. What leads to pods, and what holds a Service's address, is left."""
    around = Surrounding(
        (to_address("192.0.2.1"),),
        frozenset({to_address("198.51.100.7"), to_address("203.0.113.2")}),
    )
    with pod_at("203.0.113.2"), veth("pmf0"):  # a pod that calls itself a node
        run("ip", "link", "add", "pmb0", "type", "bridge")
        run("ip", "link", "add", "kube-ipvs0", "type", "bridge")
        try:
            run("ip", "addr", "add", "198.51.100.1/24", "dev", "pmb0")
            run("ip", "link", "set", "pmb0", "up")
            run("ip", "addr", "add", "10.96.0.10/32", "dev", "kube-ipvs0")
            run("ip", "addr", "add", "203.0.113.1/24", "dev", "pmp0")
            node = watched(AUTO, around=around, xdp_mode=AUTO)
            for name, address in ((eth, "192.0.2.1"), ("pmb0", "198.51.100.1")):
                node.until(name, served=True, role="node", addresses=[address])
            assert {row["name"] for row in node.now.rows} == {eth, "pmb0"}
            assert "default route" not in problems(node.now)
            run("ip", "addr", "add", "198.18.0.1/24", "dev", "pmf0")
            run("ip", "route", "add", "default", "via", "198.18.0.254", "dev", "pmf0")
            node.until("pmf0", served=True)
            run("ip", "address", "flush", "dev", eth, "scope", "global")
            until(lambda: not any(node.row(eth)["addresses"]), "another look")
            assert node.element(eth)["flags"] == NODE  # away for a moment
        finally:
            for name in ("pmb0", "kube-ipvs0"):
                run("ip", "link", "del", name)


# -- what fails ----------------------------------------------------------------------------------


def test_one_device_that_fails_leaves_the_others_served(
    eth: str, watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DeviceLinks.serve

    def serve(self: DeviceLinks, programs: Path, one: Served, *more: Any) -> Outcome:
        if one.device.name == eth:
            raise OSError(errno.ENOMEM, "no memory")
        return real(self, programs, one, *more)

    with veth("pmz9"), monkeypatch.context() as patched:
        patched.setattr(DeviceLinks, "serve", serve)
        node = watched(eth, "pmz9")
        node.until("pmz9", served=True)
        node.until(eth, served=False, problems=["no memory"])
        assert f"device {eth}: it is not served: no memory" in problems(node.now)


def test_a_link_that_can_not_be_flipped_is_that_hook_s_fault(
    eth: str, watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    needs_linux(6, 6, "tcx")
    node = watched(eth)
    node.until(eth, served=True)
    node.close()
    with monkeypatch.context() as patched:
        patched.setattr(DeviceLinks, "_flip", fails)
        again = watched(eth)
        again.until(eth, served=False, xdp="none", tc="none")
        assert "xdp_ingress: not permitted; tc_egress: not permitted" in problems(again.now)
        again.close()


def test_what_can_not_be_looked_at_is_told(
    eth: str, watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Seen:
        raise OSError(errno.ENOBUFS, "no buffers")

    node = watched(eth)
    node.until(eth, served=True)
    with monkeypatch.context() as patched:
        patched.setattr(devices, "seen", fails)
        node.watch.want(Packets((eth,), dsr=True), Surrounding())
        until(lambda: "devices are not followed" in problems(node.now), "the problem")
        assert node.row(eth)["served"]
    until(lambda: not node.now.problems or "not followed" not in problems(node.now), "its end")


def test_a_map_full_of_devices_that_went_is_emptied_first(
    eth: str, watched: Callable[..., Watched], loaded: Loaded
) -> None:
    with contextlib.closing(bpf.Map.open(loaded.generation.maps / "devices")) as opened:
        with contextlib.suppress(OSError):  # E2BIG
            for number in range(opened.info.max_entries):
                opened.update(number.to_bytes(4, "big"), bytes(opened.info.value_size))
        assert len(opened) == opened.info.max_entries
        node = watched(eth)
        node.until(eth, served=True)
        assert len(opened) == 1


# -- what changes --------------------------------------------------------------------------------


def test_an_address_that_comes_is_followed(eth: str, watched: Callable[..., Watched]) -> None:
    own = to_address("192.0.2.77")
    node = watched(eth, around=Surrounding((own,)))
    node.until(eth, addresses=["192.0.2.1"])
    run("ip", "addr", "add", "192.0.2.77/24", "dev", eth)
    node.until(eth, addresses=["192.0.2.77"])
    assert node.element(eth)["ipv4"] == own
    run("ip", "addr", "flush", "dev", eth)
    node.until(eth, addresses=[])
    assert node.element(eth)["ipv4"] == NO_ADDRESS
    assert "has no address" in problems(node.now)


def test_a_device_that_is_made_again_is_served_again(
    eth: str, watched: Callable[..., Watched]
) -> None:
    node = watched(eth)
    node.until(eth, served=True)
    before = socket.if_nametoindex(eth)
    run("ip", "link", "del", eth)
    node.until(eth, served=False)
    until(lambda: "there is no such device" in problems(node.now), "the reason")
    with veth(eth):
        node.until(eth, served=True, xdp="native", tc=TC)
        assert socket.if_nametoindex(eth) != before
        assert node.element(eth)["flags"] == NODE
        assert len(node.links()) == 3


def test_a_device_under_another_name_keeps_its_links(
    eth: str, watched: Callable[..., Watched]
) -> None:
    node = watched("pme[07]")
    node.until(eth, served=True)
    before = node.links()
    if LINUX < (6, 2):  # a device that is up keeps its name there
        run("ip", "link", "set", eth, "down")
    run("ip", "link", "set", eth, "name", "pme7")
    run("ip", "link", "set", "pme7", "up")
    node.until("pme7", served=True)
    try:
        assert node.links() == {pin.replace(eth, "pme7"): one for pin, one in before.items()}
    finally:
        run("ip", "link", "del", "pme7")


def test_a_device_that_is_not_wanted_any_more_is_left(
    eth: str, watched: Callable[..., Watched]
) -> None:
    with veth("pmf0"):
        node = watched(eth, "pmf0")
        node.until("pmf0", served=True)
        node.watch.want(Packets((eth,)), Surrounding())
        until(lambda: not node.row("pmf0"), "one device only")
        assert not node.element("pmf0")
        assert xdp_of("pmf0") == ()
        assert all(eth in pin for pin in node.links())


def test_a_vlan_is_served_on_the_device_below(
    eth: str, watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VLAN's device is an ordinary one that is said to be one: not every kernel has them."""
    real = devices.seen

    def seen() -> Seen:
        found = real()
        lower = next(one.index for one in found.devices if one.name == eth)
        told = tuple(
            replace(one, kind="vlan", lower=lower, vlan=100) if one.name == "pmv0" else one
            for one in found.devices
        )
        return replace(found, devices=told)

    monkeypatch.setattr(devices, "seen", seen)
    run("ip", "link", "add", "pmv0", "type", "bridge")
    try:
        node = watched("pmv0")
        node.until("pmv0", xdp="none", tc=TC, vlan=100)
        node.until(eth, xdp="native", tc="none", role="carrier")
        lower, vlan = socket.if_nametoindex(eth), socket.if_nametoindex("pmv0")
        assert node.element(eth)["flags"] == 0
        element = node.element("pmv0")
        assert (element["flags"], element["lower"], element["vlan"]) == (NODE, lower, 100)
        key = lower.to_bytes(4, "little") + (100).to_bytes(4, "little")
        assert node.vlans() == {key: vlan.to_bytes(4, "little")}
    finally:
        run("ip", "link", "del", "pmv0")
    node.until("pmv0", served=False)
    until(lambda: not node.vlans() and not node.links(), "nothing left of it")


def test_a_device_may_have_a_dot_in_its_name(watched: Callable[..., Watched]) -> None:
    """bpffs takes no dots."""
    with veth("pme.5"):
        node = watched("pme.5")
        node.until("pme.5", xdp="native", tc=TC)
        assert any(pin.startswith("tc_ingress-pme:5") for pin in node.links())
        assert {link.name for link in DeviceLinks(node.root).present()} == {"pme.5"}


# -- TC before Linux 6.6 -------------------------------------------------------------------------


def test_filters_serve_where_there_is_no_tcx(
    eth: str,
    watched: Callable[..., Watched],
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POINTSMAN_TC", "clsact")
    run("tc", "qdisc", "add", "dev", eth, "clsact")
    other = loaded.generation.programs / "tc_egress"
    foreign = ["tc", "filter", "add", "dev", eth, "ingress", "prio", "9", "bpf", "da", "pinned"]
    run(*foreign, str(other))
    node = watched(eth)
    node.until(eth, tc="clsact", xdp="native", served=True)
    index, label = socket.if_nametoindex(eth), DeviceLinks(node.root)._filter_name("tc_ingress")
    found = filters.find(index, filters.INGRESS, label)
    assert found
    assert found.program == node.links()[f"tc_ingress-{eth}::filter:{index}"]
    # Who deletes the qdisc deletes the filters.
    run("tc", "qdisc", "del", "dev", eth, "clsact")
    until(lambda: filters.find(index, filters.INGRESS, label), "the filter again")
    run(*foreign, str(other))
    node.close()  # it would put it there again
    assert DeviceLinks(node.root).remove_all()
    left = run("tc", "filter", "show", "dev", eth, "ingress")
    assert "pref 9" in left
    assert "pointsman" not in left


def test_filters_are_known_through_every_mount_of_the_pins(
    eth: str, loaded: Loaded, tmp_path: Path
) -> None:
    """As in a container, where the directory has another path."""
    root, elsewhere = loaded.generation.directory.parent, tmp_path / "pins"
    elsewhere.mkdir()
    one = Served(next(d for d in devices.seen().devices if d.name == eth), NODE)
    run("mount", "--bind", str(root), str(elsewhere))
    try:
        inside = DeviceLinks(elsewhere, clsact=True)
        assert inside.serve(elsewhere / "current" / "programs", one, "none", ()).tc == "clsact"
        assert "pointsman" in run("tc", "filter", "show", "dev", eth, "ingress")
        assert len(DeviceLinks(root).remove_all()) == 2
        assert "pointsman" not in run("tc", "filter", "show", "dev", eth, "ingress")
    finally:
        run("umount", str(elsewhere))
        DeviceLinks(root).remove_all()
    other = Path("/sys/fs/bpf") / f"pm_other_{os.getpid()}"
    other.mkdir()
    try:
        names = {DeviceLinks(each)._filter_name("tc_ingress") for each in (root, other)}
        assert len(names) == 2
    finally:
        other.rmdir()


def test_a_filter_that_stays_keeps_its_mark(
    eth: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = DeviceLinks(loaded.generation.directory.parent, clsact=True)
    one = Served(next(d for d in devices.seen().devices if d.name == eth), NODE)
    links.serve(loaded.generation.programs, one, "none", ())

    def fails(*_: object) -> bool:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patched:
        patched.setattr(filters, "delete", fails)
        with pytest.raises(PointsmanError, match=f"can't be deleted: tc_egress of {eth}"):
            links.remove_all()
    assert {link.hook for link in links.present()} == {"tc_egress", "tc_ingress"}
    assert len(links.remove_all()) == 2
    assert "pointsman" not in run("tc", "filter", "show", "dev", eth, "ingress")


def test_a_renamed_device_loses_its_filters_with_the_others(loaded: Loaded) -> None:
    root = loaded.generation.directory.parent
    links = DeviceLinks(root, clsact=True)

    def serve(name: str) -> Outcome:
        one = Served(next(d for d in devices.seen().devices if d.name == name), NODE)
        return links.serve(loaded.generation.programs, one, "none", links.present())

    def rename(old: str, new: str) -> None:
        run("ip", "link", "set", old, "down")
        run("ip", "link", "set", old, "name", new)
        run("ip", "link", "set", new, "up")

    def ours(name: str) -> int:
        shown = (run("tc", "filter", "show", "dev", name, way) for way in ("ingress", "egress"))
        return sum("pointsman" in text for text in shown)

    with veth("pmf0"):
        assert serve("pmf0").tc == "clsact"
        rename("pmf0", "pmf1")
        try:
            another = ("type", "veth", "peer", "name", "pmf2p")
            run("ip", "link", "add", "pmf0", *another)  # has its name now
            assert (len(links.remove_all()), ours("pmf1")) == (2, 0)
            run("ip", "link", "del", "pmf0")
            # Served again, it has the marks of its name, and the same filters all the time.
            assert serve("pmf1").tc == "clsact"
            rename("pmf1", "pmf0")
            assert (serve("pmf0").tc, ours("pmf0")) == ("clsact", 2)
            assert {link.name for link in links.present()} == {"pmf0"}
            assert (len(links.remove_all()), ours("pmf0")) == (2, 0)
        finally:
            links.remove_all()
            subprocess.run(["ip", "link", "del", "pmf1"], check=False, capture_output=True)


def test_unload_does_the_rest_where_a_filter_stays(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_self: DeviceLinks) -> list[str]:
        raise PointsmanError("filters that can't be deleted")

    pins = Pins(Path("/sys/fs/bpf") / f"pm_stays_{os.getpid()}", SMALL)
    pins.prepare_root()
    (pins.root / "g_0123456789ab").mkdir()
    removed: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(DeviceLinks, "remove_all", fails)
        patched.setattr(SocketLinks, "remove_all", lambda _self: removed.append("sockets") or [])
        with pytest.raises(PointsmanError, match="can't be deleted"):
            pins.unload()
    assert removed == ["sockets"]
    assert not pins.root.exists()


def test_filters_and_links_change_places(eth: str, loaded: Loaded) -> None:
    needs_linux(6, 6, "tcx")
    root = loaded.generation.directory.parent
    served = next(d for d in devices.seen().devices if d.name == eth)

    def serve(links: DeviceLinks) -> Outcome:
        one = Served(served, NODE)
        return links.serve(loaded.generation.programs, one, "native", links.present())

    try:
        assert serve(DeviceLinks(root, clsact=True)).tc == "clsact"
        assert serve(DeviceLinks(root)).tc == "tcx"
        label = DeviceLinks(root)._filter_name("tc_ingress")
        assert not filters.find(served.index, filters.INGRESS, label)
        assert {link.is_filter for link in DeviceLinks(root).present()} == {False}
    finally:
        DeviceLinks(root).remove_all()


# -- neighbours ----------------------------------------------------------------------------------


def test_next_hops_to_other_nodes_are_kept_and_given_back(
    eth: str, watched: Callable[..., Watched]
) -> None:
    run("ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.254", "dev", eth)
    run("ip", "neigh", "add", "192.0.2.3", "lladdr", "02:00:00:00:00:03", "nud", "permanent",
        "dev", eth)  # fmt: skip
    others = {to_address(text) for text in ("192.0.2.2", "192.0.2.3", "198.51.100.7")}
    node = watched(eth, around=Surrounding(other_nodes=frozenset(others)))
    index = socket.if_nametoindex(eth)
    kept: set[tuple[int, Address]] = {
        (index, to_address("192.0.2.2")), (index, to_address("192.0.2.254"))
    }  # fmt: skip
    until(lambda: neighbours.kept_neighbours()[0] == kept, "both next hops")
    assert "PERMANENT" in run("ip", "neigh", "show", "192.0.2.3")
    node.watch.want(Packets((eth,)), Surrounding())
    until(lambda: not neighbours.kept_neighbours()[0], "none any more")
    assert "PERMANENT" in run("ip", "neigh", "show", "192.0.2.3")


# -- pods ----------------------------------------------------------------------------------------


def test_the_host_s_side_of_a_pod_is_found_and_served(
    eth: str, watched: Callable[..., Watched]
) -> None:
    with pod_at("192.0.2.200") as pod:
        index, address = socket.if_nametoindex("pmp0"), to_address("192.0.2.200")
        assert found_in(frozenset({address}))[address] == (cookie_of(pod), index)
        node = watched(eth, around=Surrounding(pods=frozenset({index})))
        node.until("pmp0", xdp="none", tc=TC, role="pod")
        assert node.element("pmp0")["flags"] == POD


# -- generations ---------------------------------------------------------------------------------


def map_ids(loaded: Loaded) -> dict[str, int]:
    found = {}
    for path in loaded.generation.maps.iterdir():
        opened = bpf.Map.open(path, read_only=True)
        found[path.name] = opened.info.id
        opened.close()
    return found


def test_flows_outlive_an_upgrade_and_are_never_thrown_away(loaded: Loaded) -> None:
    root = loaded.generation.directory.parent
    before = map_ids(loaded)
    other = Pins(root, replace(SMALL, flows_new=1024)).load(packets=True)
    try:
        after = map_ids(other)
        anew = {name for name in before if before[name] != after[name]}
        assert anew == {"flows_new"}
    finally:
        shutil.rmtree(other.generation.directory)


def test_packets_can_be_added_to_a_generation_that_runs_and_taken_out(kernel: None) -> None:
    pins = Pins(Path("/sys/fs/bpf") / f"pm_added_{os.getpid()}", SMALL)
    try:
        sockets = pins.load()
        before = map_ids(sockets)
        assert not before.keys() & {"flows", "trace", "devices"}
        added = pins.load(packets=True)
        assert (added.generation, added.fresh, added.packets) == (
            sockets.generation,
            True,
            True,
        )
        after = map_ids(added)
        assert before.items() < after.items()
        assert not pins.load(packets=True).fresh
        pins.drop_packets(added.generation)
        assert map_ids(added) == before
        assert not pins.load().fresh
    finally:
        pins.unload()


# -- an agent ------------------------------------------------------------------------------------


def links_of(node: AgentProcess) -> dict[str, tuple[int, int]]:
    """Pin → (link id, program id); of a filter the program is what is pinned."""
    found = {}
    for link in DeviceLinks(node.root).present():
        fd = bpf.obj_get(node.root / "links" / link.pin)
        ident = 0 if link.is_filter else int.from_bytes(bpf._info(fd)[4:8], "little")
        found[link.pin] = (ident, link.program)
        os.close(fd)
    return found


def devices_of(node: AgentProcess) -> dict[str, Any]:
    """Name → row of the status file."""
    return {row["name"]: row for row in node.status().get("devices", {}).get("items", ())}


def served(node: AgentProcess, name: str) -> bool:
    return bool(devices_of(node).get(name, {}).get("served"))


def problems_of(node: AgentProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.status()["problems"]
    return found


def test_an_agent_serves_devices_and_leaves_them_served(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path]
) -> None:
    node.write("node.yaml", node_of("worker", "192.0.2.1"))
    node.start("--devices", eth, "--node-name", "worker")
    until(lambda: served(node, eth), f"a row of {eth}")
    assert node.cli("status", check=False).returncode == 0
    before = links_of(node)
    node.kill()
    assert links_of(node) == before

    node.start("--devices", eth, "--node-name", "worker")
    until(lambda: served(node, eth), "the row again")
    assert links_of(node) == before, "an agent that starts again changes nothing"
    node.stop()

    newer = changed_source(("packets.c", "int xdp_ingress(", "/* newer */ int xdp_ingress("))
    node.start("--devices", eth, "--node-name", "worker", source=newer)
    until(lambda: served(node, eth), "the row of an upgrade")
    until(lambda: all(links_of(node)[pin][1] != old for pin, (_, old) in before.items()), "flips")
    assert {pin: link for pin, (link, _) in links_of(node).items()} == {
        pin: link for pin, (link, _) in before.items()
    }, "each link is flipped, none is made anew"
    node.stop()

    node.cli("unload")
    assert not node.root.exists()
    assert xdp_of(eth) == ()


def test_explain_from_outside_is_of_a_flow_that_begins_or_is_open(
    node: AgentProcess, eth: str
) -> None:
    node.write("node.yaml", node_of("worker", "192.0.2.1"))
    node.write("web.yaml", service_of("web", ["10.96.0.9"], 80, type="NodePort", nodePort=30080))
    node.write("slice.yaml", slice_of("web", [("192.0.2.7", {})], 8080))
    node.start("--devices", eth, "--node-name", "worker")
    until(lambda: served(node, eth), f"a row of {eth}")
    asked = ("explain", "192.0.2.1:30080", "--from", "198.51.100.7:4000", "-o", "json")
    begins = json.loads(node.cli(*asked).stdout)
    assert (begins["verdict"], begins["endpoint"]) == ("forwarded", "192.0.2.7:8080")
    opened = json.loads(node.cli(*asked, "--open").stdout)
    assert (opened["verdict"], "began before" in opened["why"]) == ("passed", True)


def test_an_agent_without_devices_takes_back_what_another_attached(
    node: AgentProcess, eth: str
) -> None:
    node.start("--devices", eth)
    until(lambda: served(node, eth), f"a row of {eth}")
    node.stop()
    node.start()
    assert not links_of(node)
    assert xdp_of(eth) == ()
    assert node.status()["devices"] == {
        "wanted": False, "named": False, "loading": False, "error": "", "former": False,
        "items": [],
    }  # fmt: skip
    maps = {path.name for path in (node.root / "current" / "maps").iterdir()}
    assert not maps & {"flows", "devices", "packet_settings"}
    assert node.cli("status", check=False).returncode == 0


def test_a_device_that_is_not_there_makes_the_node_unhealthy(node: AgentProcess) -> None:
    node.start("--devices", "pmx7")
    until(lambda: "pmx7" in devices_of(node), "its row")
    done = node.cli("status", check=False)
    assert done.returncode == 1
    assert "pmx7" in done.stdout


def test_programs_that_can_not_be_loaded_leave_sockets_served(
    node: AgentProcess, eth: str, changed_source: Callable[..., Path]
) -> None:
    broken = changed_source(("packets.c", "int xdp_ingress(", "int another_name("))
    node.start("--devices", eth, source=broken)
    status = node.status()
    assert status["sync"]["attached"]
    assert status["devices"]["error"]
    assert any("not served: the packet programs" in p["message"] for p in status["problems"])
    assert node.cli("status", check=False, source=broken).returncode == 1
    assert not links_of(node)
    node.stop()

    # As nobody asked for them by name, they are no reason to call the node unhealthy.
    node.start("--devices", "auto", source=broken)
    done = node.cli("status", check=False, source=broken)
    assert (done.returncode, "warning: packets from outside are not served" in done.stderr) == (
        0,
        True,
    )
    assert {p["severity"] for p in node.status()["problems"]} == {"warning"}


def test_auto_serves_the_way_out_and_is_content_without_one(node: AgentProcess, eth: str) -> None:
    """The namespace of these tests has no default route."""
    node.start("--devices", "auto")
    until(
        lambda: any("no device has a default route" in p["message"] for p in problems_of(node)),
        "the warning",
    )
    assert {p["severity"] for p in problems_of(node)} == {"warning"}
    assert (node.cli("status", check=False).returncode, links_of(node)) == (0, {})

    run("ip", "route", "add", "default", "via", "192.0.2.254", "dev", eth)
    until(lambda: served(node, eth), f"a row of {eth}")
    assert not any("default route" in p["message"] for p in problems_of(node))


def test_auto_serves_the_node_s_own_address_also_after_a_restart(
    node: AgentProcess, eth: str
) -> None:
    """And no more: the namespace of these tests has no default route."""
    node.write("node.yaml", node_of("worker", "192.0.2.1"))
    for _ in range(2):
        node.start("--devices", "auto", "--node-name", "worker")
        until(lambda: served(node, eth), f"a row of {eth}")
        assert not any("default route" in p["message"] for p in problems_of(node))
        assert node.cli("status", check=False).returncode == 0
        node.stop()


def test_the_device_of_a_pod_that_opted_out_is_served(node: AgentProcess, eth: str) -> None:
    annotations = {"pointsman.io/socket-lb": "disabled"}
    with pod_at("192.0.2.200"):
        node.write("node.yaml", node_of("worker", "192.0.2.1"))
        spec = {"nodeName": "worker", "containers": [{"name": "c", "image": "i"}]}
        status = {"podIP": "192.0.2.200", "podIPs": [{"ip": "192.0.2.200"}], "phase": "Running"}
        node.write(
            "pod.yaml",
            manifest("Pod", "sandboxed", annotations=annotations, spec=spec, status=status),
        )
        node.start("--devices", eth, "--node-name", "worker")
        until(lambda: served(node, "pmp0"), "the pod's device")
        assert devices_of(node)["pmp0"]["role"] == "pod"
        # Until it is found again at a restart, nothing is detached.
        before = links_of(node)
        node.stop()
        mark = len(node.log.read_text())
        node.start("--devices", eth, "--node-name", "worker")
        until(lambda: served(node, "pmp0"), "the pod's device again")
        assert "detached" not in node.log.read_text()[mark:]
        assert links_of(node) == before
        node.remove("pod.yaml")
        until(lambda: "pmp0" not in devices_of(node), "only the node's own")


def test_a_device_of_tests_is_left_behind_by_none(kernel: None) -> None:
    """The tests above clean up: nothing of theirs is pinned, no device is left."""
    assert not (Path("/sys/fs/bpf") / f"pm_node_{os.getpid()}").exists()
    assert not [one.name for one in devices.seen().devices if one.name.startswith("pm")]
    assert shutil.which("ip")
