"""Counts the IPv4 packets of this network namespace, in and out, on every device.

    count_packets.py NETWORK...

For each network a packet socket with a filter "source or destination is in it" counts in the
kernel; nothing is read, so nothing is missed. Prints "ready", then for every line of its standard
input a JSON object {network: packets until now}.
"""

import ctypes
import ipaddress
import json
import socket
import struct
import sys

_ETH_P_ALL, _PACKET_STATISTICS, _SOL_PACKET, _SO_ATTACH_FILTER = 3, 6, 263, 26
# Classic BPF: load a word, and with a constant, jump if equal, return.
_LOAD, _LOAD_HALF, _AND, _EQUAL, _RETURN = 0x20, 0x28, 0x54, 0x15, 0x06
_PROTOCOL = 0xFFFFF000  # SKF_AD_OFF + SKF_AD_PROTOCOL: the EtherType, whatever the link layer


def counter(network: str) -> socket.socket:
    net = ipaddress.IPv4Network(network)
    address, mask = int(net.network_address), int(net.netmask)
    # With SOCK_DGRAM the packet begins at the IP header: source at byte 12, destination at 16.
    program = [
        (_LOAD_HALF, 0, 0, _PROTOCOL),
        (_EQUAL, 0, 7, 0x0800),
        (_LOAD, 0, 0, 12),
        (_AND, 0, 0, mask),
        (_EQUAL, 3, 0, address),
        (_LOAD, 0, 0, 16),
        (_AND, 0, 0, mask),
        (_EQUAL, 0, 1, address),
        (_RETURN, 0, 0, 64),
        (_RETURN, 0, 0, 0),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(buffer))
    packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
    seen(packets)  # reading the count sets it to 0: what came before the filter is not in it
    return packets


def seen(packets: socket.socket) -> int:
    """Packets that passed the filter; the kernel's count has those it had no room for in it."""
    return int(struct.unpack("II", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[0])


counters = {network: counter(network) for network in sys.argv[1:]}
print("ready", flush=True)
totals = dict.fromkeys(counters, 0)
for _ in sys.stdin:
    for network, packets in counters.items():
        totals[network] += seen(packets)
    print(json.dumps(totals), flush=True)
