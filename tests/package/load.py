"""A backend and its clients, for the scripts beside it, with nothing but Python.

serve ADDRESS PORT              TCP, "hello" to everybody; runs until it is ended
once ADDRESS PORT               prints what is answered, "" if nobody does
hold ADDRESS PORT REPORT        a connected UDP socket; REPORT is "held", then how it ended
load ADDRESS PORT REPORT        connects without end; at SIGTERM REPORT is "failed N of M …"
"""

import contextlib
import errno
import select
import signal
import socket
import sys
import time
from pathlib import Path


def serve(address: str, port: str) -> None:
    with socket.create_server((address, int(port)), backlog=1024) as server:
        while True:
            one = server.accept()[0]
            with one, contextlib.suppress(OSError):
                one.sendall(b"hello")


def ask(address: str, port: str) -> str:
    with socket.create_connection((address, int(port)), timeout=5) as one:
        return one.recv(16).decode()


def once(address: str, port: str) -> None:
    try:
        print(ask(address, port))
    except OSError:
        print()


def hold(address: str, port: str, report: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect((address, int(port)))
        Path(report).write_text("held\n")
        select.select([one], [], [])
        error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        Path(report).write_text(f"{errno.errorcode.get(error, error)}\n")


def load(address: str, port: str, report: str) -> None:
    """One connection after the other, ten a second: an emulated CPU has more to do."""
    done, failures = 0, list[str]()
    ended = list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    while not ended:
        try:
            if ask(address, port) != "hello":
                failures.append("no answer")
        except OSError as error:
            failures.append(f"{time.strftime('%T')} {error!r}")
        done += 1
        time.sleep(0.1)
    Path(report).write_text(f"failed {len(failures)} of {done} {failures[:3]}\n")


if __name__ == "__main__":
    {"serve": serve, "once": once, "hold": hold, "load": load}[sys.argv[1]](*sys.argv[2:])
