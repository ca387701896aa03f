"""Programs without what older kernels lack: they do less, and it is said what. By taking it out,
on any kernel; and by what this kernel really has, which tells most where it is an old one."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pointsman import bpf
from pointsman.cli.look import explain
from pointsman.hooks import LOST
from pointsman.observe import lacks
from tests.support.kernel import LINUX, REFUSED, TCP, Lab, tcp_server, until

pytestmark = pytest.mark.kernel

WITHOUT_SET_RETVAL = ("sock.c", "#ifdef HAVE_SET_RETVAL", "#if 0")
WITHOUT_SWAP = (
    "atomic.h",
    "#define barrier()",
    "#undef HAVE_COMPARE_AND_SWAP\n#define barrier()",
)
VIP = ("10.96.0.1", 80)


def test_what_is_refused_without_set_retval_is_not_permitted(
    fresh_lab: Callable[..., Lab], changed_source: Callable[..., Path]
) -> None:
    lab = fresh_lab(source=changed_source(WITHOUT_SET_RETVAL))
    lab.serve(*VIP, TCP)
    with socket.socket() as client, pytest.raises(PermissionError):
        client.connect(VIP)
    with tcp_server() as (_, port), socket.socket() as client:
        lab.serve(*VIP, TCP, ("127.0.0.1", port))
        client.connect(VIP)


def test_records_without_compare_and_swap_are_in_the_overflow_map(
    fresh_lab: Callable[..., Lab], changed_source: Callable[..., Path]
) -> None:
    lab = fresh_lab(source=changed_source(WITHOUT_SWAP))
    with tcp_server() as (server, port):
        lab.serve(*VIP, TCP, ("127.0.0.1", port))
        for _ in range(2):  # what is freed can be taken again
            clients = [socket.create_connection(VIP) for _ in range(8)]
            assert [client.getpeername() for client in clients] == [VIP] * 8
            assert len(lab.maps.map("sockets_overflow")) == lab.records() == 8
            assert lab.open("127.0.0.1", port) == 8
            for client in clients:
                client.close()
            until(lambda: lab.records() == 0, "the records freed")
            assert lab.open("127.0.0.1", port) == 0


def test_a_socket_that_connects_twice_without_compare_and_swap_has_one_record(
    fresh_lab: Callable[..., Lab], changed_source: Callable[..., Path]
) -> None:
    lab = fresh_lab(source=changed_source(WITHOUT_SWAP))
    lab.serve(*VIP, 17, ("127.0.0.1", 9))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(3):
            client.connect(VIP)
            assert client.getpeername() == VIP
            assert (lab.records(), lab.open("127.0.0.1", 9)) == (1, 1)
        client.connect(("127.0.0.1", 9))
        assert client.getpeername() == ("127.0.0.1", 9)
        assert (lab.records(), lab.open("127.0.0.1", 9)) == (0, 0)


def test_the_error_of_a_refused_connect_is_that_of_this_kernel(lab: Lab) -> None:
    lab.serve(*VIP, TCP)
    with socket.socket() as client, pytest.raises(REFUSED):
        client.connect(VIP)


def test_status_says_what_this_kernel_lacks(kernel: None) -> None:
    said = " ".join(lacks())
    assert ("fail with EPERM" in said) == (LINUX < (5, 18))
    for text in ("programs compare and swap from", "no endpoint is ejected"):
        assert (text in said) == (LINUX < (5, 12)), text
    assert ("MPTCP socket tells the endpoint" in said) == (LINUX < (5, 19))
    assert ("the bind guard and opt-outs of pods are off" in said) == (LINUX < (5, 14))


def test_whether_programs_compare_and_swap_is_found_by_trying(kernel: None) -> None:
    assert bpf.compares_and_swaps() == (LINUX >= (5, 12))


def test_explain_names_the_error_of_this_kernel(lab: Lab) -> None:
    lab.serve(*VIP, TCP)
    done = CliRunner().invoke(explain, [f"{VIP[0]}:81", "--bpffs", str(lab.root)])
    with socket.socket() as client, pytest.raises(OSError) as caught:
        client.connect((VIP[0], 81))
    assert f"{errno.errorcode[caught.value.errno or 0]}: no Service defines port 81" in done.output


def test_what_is_lost_is_logged_at_the_load(
    fresh_lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pointsman.agent"):
        fresh_lab()
    said = [record.message for record in caplog.records if "on this kernel" in record.message]
    since = {"HAVE_SET_RETVAL": (5, 18), "HAVE_COMPARE_AND_SWAP": (5, 12), "HAVE_MPTCP": (5, 19)}
    for name, first in since.items():
        assert any(LOST[name] in message for message in said) == (first > LINUX), (name, said)


def test_packets_are_served_or_the_version_is_named(fresh_lab: Callable[..., Lab]) -> None:
    loaded = fresh_lab().pins.load(packets=True)
    assert loaded.packets or LINUX < (6, 1), loaded.packets_error
    if LINUX < (5, 12):
        assert "there from Linux 5.12 on" in loaded.packets_error
    assert loaded.packets or "known to load on Linux 6.1" in loaded.packets_error
