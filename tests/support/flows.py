"""Entries of `flows` made by hand: one flow of a client outside to an endpoint on another node."""

from __future__ import annotations

import struct

from pointsman import abi, bpf
from pointsman.flows import REMOTE, REPLY, Tuple, pack_tuple
from pointsman.values import TCP, Address, to_address

CLIENT = to_address("198.51.100.9"), 40000
VIP = to_address("192.0.2.1"), 80
NODE = to_address("192.0.2.1"), 61001
ENDPOINT = to_address("10.244.1.5"), 8080

_layout = abi.layouts()["flow"]
_pack = _layout.packer("other", "seen", "endpoint", "generation", "owner", "flags")
_SEEN = _layout.field("seen").offset


def entries(
    *,
    client: tuple[Address, int] = CLIENT,
    reply_port: int = NODE[1],
    protocol: int = TCP,
    client_flags: int = 0,
    reply_flags: int = 0,
    seen: int = 0,
    owner: int = 1,
) -> dict[bytes, bytes]:
    """The client's half and the reply's, in this order; `seen` in ns."""
    forward = pack_tuple(Tuple(*client, *VIP, protocol))
    back = pack_tuple(Tuple(*ENDPOINT, NODE[0], reply_port, protocol))
    return {
        forward: _pack(back, seen, 5, 1, owner, client_flags),
        back: _pack(forward, seen, 5, 1, owner, reply_flags | REPLY),
    }


def half(value: bytes, *, seen: int) -> bytes:
    """The same half, seen at another time."""
    return value[:_SEEN] + struct.pack("=Q", seen) + value[_SEEN + 8 :]


def fill(flows: bpf.Map, count: int, *, flags: int = 0, seen: int = 0) -> None:
    """So many flows of as many clients to 250 endpoints on other nodes, in batches."""
    for first in range(0, count, 2000):
        keys: list[bytes] = []
        values: list[bytes] = []
        for number in range(first, min(first + 2000, count)):
            client = bytes(10) + b"\xff\xff" + struct.pack("!I", 10 << 24 | number)
            endpoint = ENDPOINT[0][:15] + bytes([number % 250])
            # A node with as many addresses as it takes for the ports of so many flows.
            node = NODE[0][:15] + bytes([number // 1_000_000])
            port = 1024 + number // 250 % 60000
            forward = pack_tuple(Tuple(client, 40000, *VIP, TCP))
            back = pack_tuple(Tuple(endpoint, 8080, node, port, TCP))
            keys += [forward, back]
            values.append(_pack(back, seen, 5, 1, 1, flags | REMOTE))
            values.append(_pack(forward, seen, 5, 1, 1, flags | REMOTE | REPLY))
        assert flows.update_batch(b"".join(keys), b"".join(values)) == len(keys)
