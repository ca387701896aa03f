"""A backend, one client, and clients without end; for `node.sh`, with nothing but Python.

serve ADDRESS PORT | once ADDRESS PORT | load ADDRESS PORT REPORT
"""

import signal
import socket
import sys
import time
from pathlib import Path


def serve(address: str, port: str) -> None:
    with socket.create_server((address, int(port)), backlog=1024) as server:
        while True:
            with server.accept()[0] as one:
                one.sendall(b"hello")


def ask(address: str, port: str) -> str:
    with socket.create_connection((address, int(port)), timeout=5) as one:
        return one.recv(16).decode()


def once(address: str, port: str) -> None:
    try:
        print(ask(address, port))
    except OSError:
        print()


def load(address: str, port: str, report: str) -> None:
    """Until SIGTERM: one connection after the other, a hundred a second at most."""
    done, failures = 0, list[str]()
    ended = list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    while not ended:
        try:
            if ask(address, port) != "hello":
                failures.append("no answer")
        except OSError as error:
            failures.append(repr(error))
        done += 1
        time.sleep(0.01)
    Path(report).write_text(f"failed {len(failures)} of {done} {failures[:3]}\n")


if __name__ == "__main__":
    {"serve": serve, "once": once, "load": load}[sys.argv[1]](*sys.argv[2:])
