"""Frames through a program by BPF_PROG_TEST_RUN, and what came out of them.

Nothing is sent: the kernel hands the frame to the program as if a device had received it, and
gives back the verdict and the frame as the program left it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from pointsman.bpf import Map, _libbpf, _RunOpts, map_info, obj_pin

XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = range(5)
TC_OK, TC_SHOT, TC_REDIRECT, TC_UNSPEC = 0, 2, 7, 0xFFFFFFFF
#: Verdicts by what they mean for a packet, in the words of a test.
PASS, DROP, SEND = "pass", "drop", "send"
_XDP = {XDP_PASS: PASS, XDP_DROP: DROP, XDP_TX: SEND, XDP_REDIRECT: SEND}
_TC = {TC_OK: PASS, TC_UNSPEC: PASS, TC_SHOT: DROP, TC_REDIRECT: SEND}

_ROOM = 8192
_CHECKSUM_COMPLETE = 1 << 2  # BPF_F_TEST_SKB_CHECKSUM_COMPLETE
_SKB_CONTEXT = 192  # struct __sk_buff, Linux 5.18: what is behind is taken for zero
_SKB_INGRESS_IFINDEX, _SKB_IFINDEX, _SKB_GSO_SIZE = 36, 40, 176


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. `code` is what the program returned, `verdict` what that means."""

    code: int
    verdict: str
    frame: bytes


def _xdp_context(length: int, ifindex: int) -> bytes:
    # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
    return struct.pack("=6I", 0, length, 0, ifindex, 0, 0)


def _skb_context(ifindex: int, segment: int) -> bytes:
    context = bytearray(_SKB_CONTEXT)
    struct.pack_into("=II", context, _SKB_INGRESS_IFINDEX, ifindex, ifindex)
    struct.pack_into("=I", context, _SKB_GSO_SIZE, segment)
    return bytes(context)


def test_run(
    program: int,
    frame: bytes,
    ifindex: int,
    *,
    xdp: bool,
    segment: int = 0,
    summed: bool = False,
) -> Outcome:
    """Runs a program once. Devices and routes are those of the calling thread's network namespace;
    for XDP the device must have a program attached, else it has no receive queue to speak of.

    `segment`: TC has several packets as this one, with so many bytes of payload each. `summed`: as
    if the device had computed the sum of the whole packet (CHECKSUM_COMPLETE). EBADMSG then says
    that it is no longer right; before Linux 6.15 the kernel has no such test, EINVAL."""
    data = ctypes.create_string_buffer(frame, len(frame))
    out = ctypes.create_string_buffer(_ROOM)
    context = _xdp_context(len(frame), ifindex) if xdp else _skb_context(ifindex, segment)
    given = ctypes.create_string_buffer(context, len(context))
    options = _RunOpts(sz=ctypes.sizeof(_RunOpts), repeat=1)
    options.flags = _CHECKSUM_COMPLETE if summed else 0
    options.data_in, options.data_size_in = ctypes.addressof(data), len(frame)
    options.data_out, options.data_size_out = ctypes.addressof(out), _ROOM
    options.ctx_in, options.ctx_size_in = ctypes.addressof(given), len(context)
    if _libbpf.bpf_prog_test_run_opts(program, ctypes.byref(options)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"test run, {len(frame)} bytes: {os.strerror(number)}")
    code = options.retval
    words = _XDP if xdp else _TC
    verdict = words.get(code, f"unknown verdict {code}")
    return Outcome(code, verdict, out.raw[: options.data_size_out])


test_run.__test__ = False  # type: ignore[attr-defined] # no test of its own, whatever its name


def map_of(program: int, name: str) -> Map:
    """A map that a program uses, also one that is pinned nowhere."""
    ids = (ctypes.c_uint32 * 64)()
    # struct bpf_prog_info: nr_map_ids and map_ids.
    asked = struct.pack("=52xIQ", len(ids), ctypes.addressof(ids))
    info, length = ctypes.create_string_buffer(asked, 256), ctypes.c_uint32(256)
    if _libbpf.bpf_obj_get_info_by_fd(program, info, ctypes.byref(length)) < 0:
        raise OSError(ctypes.get_errno(), "information about a program")
    for ident in ids[: struct.unpack_from("=I", info, 52)[0]]:
        fd: int = _libbpf.bpf_map_get_fd_by_id(ctypes.c_uint32(ident))
        if fd >= 0 and map_info(fd).name == name:
            return Map(fd)
        os.close(fd)
    raise LookupError(name)


def pin_pass(path: Path) -> None:
    """Pins an XDP program that lets everything pass."""
    instructions = struct.pack("<BBhi", 0xB7, 0, 0, XDP_PASS) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    program = _libbpf.bpf_prog_load(6, b"pass", b"GPL", instructions, ctypes.c_size_t(2), None)
    if program < 0:
        raise OSError(ctypes.get_errno(), "load a program that passes everything")
    try:
        obj_pin(program, path)
    finally:
        os.close(program)


#: Frames that the kernel takes for none at all: too short for an Ethernet header, or too long.
NO_FRAME = (errno.EINVAL, errno.ENOMEM)
