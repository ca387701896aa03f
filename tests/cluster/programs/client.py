"""A client that does what its standard input says: one line of JSON in, one out.

{"do": one of `verbs`, …}: what there is to each, tests/cluster/clients.py says.
"""

import collections
import errno
import json
import socket
import sys
import threading
from typing import Any, NamedTuple


class Loop(NamedTuple):
    ended: threading.Event
    threads: list[threading.Thread]
    pods: collections.Counter[str]
    errors: collections.Counter[str]


kept: dict[int, socket.socket] = {}
loops: dict[int, Loop] = {}


def connected(wanted: dict[str, Any]) -> socket.socket:
    family = socket.AF_INET6 if ":" in wanted["address"] else socket.AF_INET
    kind = socket.SOCK_DGRAM if wanted["protocol"] == "udp" else socket.SOCK_STREAM
    made = socket.socket(family, kind)
    made.settimeout(wanted["timeout"])
    try:
        if wanted["source"]:
            made.bind((wanted["source"], 0))
        made.connect((wanted["address"], wanted["port"]))
    except BaseException:
        made.close()
        raise
    return made


def greeted(made: socket.socket) -> dict[str, Any]:
    if made.type == socket.SOCK_DGRAM:
        made.send(b"who\n")
    text = b""
    while not text.endswith(b"\n"):
        more = made.recv(4096)
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "ended before it said who it is")
        text += more
    address, port = made.getpeername()[:2]
    return {**json.loads(text), "peer": address, "peer_port": port}


def ask(wanted: dict[str, Any]) -> dict[str, Any]:
    with connected(wanted) as made:
        return greeted(made)


def keep(wanted: dict[str, Any]) -> dict[str, Any]:
    made = connected(wanted)
    kept[made.fileno()] = made
    return {**greeted(made), "id": made.fileno()}


def talk(wanted: dict[str, Any]) -> dict[str, Any]:
    made = kept[wanted["id"]]
    if made.type == socket.SOCK_DGRAM:
        return greeted(made)
    made.sendall(b"still there?\n")
    if not made.recv(4096):
        raise ConnectionResetError(errno.ECONNRESET, "ended")
    return {}


def close(wanted: dict[str, Any]) -> dict[str, Any]:
    kept.pop(wanted["id"]).close()
    return {}


def loop(wanted: dict[str, Any]) -> dict[str, Any]:
    made = Loop(threading.Event(), [], collections.Counter(), collections.Counter())
    tally = threading.Lock()

    def work() -> None:
        while not made.ended.wait(wanted["pause"]):
            try:
                pod = ask(wanted)["pod"]
            except OSError as error:
                with tally:
                    made.errors[named(error)] += 1
            else:
                with tally:
                    made.pods[pod] += 1

    for _ in range(wanted["threads"]):
        made.threads.append(threading.Thread(target=work, daemon=True))
        made.threads[-1].start()
    loops[len(loops)] = made
    return {"id": len(loops) - 1}


def so_far(wanted: dict[str, Any]) -> dict[str, Any]:
    found = loops[wanted["id"]]
    if wanted["stop"]:
        found.ended.set()
        for thread in found.threads:
            thread.join()
    return {"pods": found.pods.copy(), "errors": found.errors.copy()}


def query(wanted: dict[str, Any]) -> dict[str, Any]:
    import dns.message
    import dns.query
    import dns.rcode

    message = dns.message.make_query(wanted["name"], wanted["type"])
    send = dns.query.tcp if wanted["protocol"] == "tcp" else dns.query.udp
    try:
        answer = send(message, wanted["address"], wanted["timeout"], port=wanted["port"])
    except dns.exception.Timeout:
        raise TimeoutError from None
    found = [item.to_text() for records in answer.answer for item in records]
    return {"answers": sorted(found), "rcode": dns.rcode.to_text(answer.rcode())}


def named(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return errno.errorcode.get(error.errno or 0, str(error))


verbs = {
    "ask": ask, "open": keep, "talk": talk, "close": close, "loop": loop, "so far": so_far,
    "query": query,
}  # fmt: skip
for line in sys.stdin:
    order = json.loads(line)
    try:
        answer = verbs[order["do"]](order)
    except OSError as error:
        answer = {"error": named(error)}
    print(json.dumps(answer), flush=True)
