"""What runs in a pod: says on every port which pod it is and whom it sees, then echoes.

server.py NAME tcp:PORT udp:PORT …

TCP: one line of JSON at once, then each line back. UDP: that line for every datagram.
"""

import asyncio
import json
import signal
import socket
import sys
from typing import cast

NAME = sys.argv[1]


def greeting(peer: tuple[str, int]) -> bytes:
    return json.dumps({"pod": NAME, "from": f"{peer[0]}", "port": peer[1]}).encode() + b"\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        writer.write(greeting(writer.get_extra_info("peername")))
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        self.transport.sendto(greeting(peer), peer)


def datagrams(family: int, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(("", port))
    return made


async def main() -> None:
    loop = asyncio.get_running_loop()
    kept: list[object] = []  # asyncio holds servers weakly
    for wanted in sys.argv[2:]:
        protocol, _, port = wanted.partition(":")
        if protocol == "tcp":
            kept.append(
                await asyncio.start_server(serve, ["0.0.0.0", "::"], int(port), backlog=1024)
            )
            continue
        for family in (socket.AF_INET, socket.AF_INET6):
            made = datagrams(family, int(port))
            kept.append(await loop.create_datagram_endpoint(Datagrams, sock=made))
    end = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    await end.wait()


asyncio.run(main())
