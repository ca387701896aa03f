"""Both ends of the measure "from a change to the data path", as processes of their own.

    prober.py serve PORT                   tells each client the address that it has reached
    prober.py probe ADDRESS PORT TIMEOUT   connects every millisecond, TIMEOUT in seconds

`probe` prints a line for each error and for each answer that differs from what was before: the time
at which it was in hand (ns, CLOCK_MONOTONIC), and the address, or "!" and the error's name.
"""

import errno
import socket
import struct
import sys
import time

PERIOD = 0.001
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: no port stays in TIME_WAIT, whatever the rate


def serve(port: int) -> None:
    with socket.create_server(("0.0.0.0", port), backlog=4096) as listening:
        while True:
            try:
                client, _ = listening.accept()
                with client:
                    client.sendall(client.getsockname()[0].encode())
            except ConnectionError:  # a client that has given up
                continue


def ask(address: str, port: int, timeout: float) -> str:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        client.settimeout(timeout)
        try:
            client.connect((address, port))
            return client.recv(64).decode() or "!EOF"
        except TimeoutError:
            return "!ETIMEDOUT"
        except OSError as error:
            return "!" + errno.errorcode[error.errno or 0]


def probe(address: str, port: int, timeout: float) -> None:
    before, due = "", time.monotonic()
    while True:
        answer = ask(address, port, timeout)
        if answer != before or answer.startswith("!"):
            print(time.monotonic_ns(), answer, flush=True)
            before = answer
        due = max(due + PERIOD, time.monotonic() - PERIOD)  # after a timeout: no burst
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", number]:
            serve(int(number))
        case ["probe", address, number, timeout]:
            probe(address, int(number), float(timeout))
        case _:
            sys.exit(__doc__)
