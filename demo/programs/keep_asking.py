"""A client that asks again and again, each time by a new connection, until it is terminated.

    keep_asking.py URL

Prints a line for every request: when it began, when it ended (CLOCK_MONOTONIC), then the name of
the pod that answered, or "failed" and why.
"""

import http.client
import signal
import sys
import threading
import time
from urllib.parse import urlsplit

url = urlsplit(sys.argv[1])
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())


def ask() -> str:
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=30)
    try:
        connection.request("GET", url.path)
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            return f"failed {response.status}"
        return response.headers["X-Pod"]
    except (OSError, http.client.HTTPException) as error:
        return f"failed {error}"
    finally:
        connection.close()


while not stopped.is_set():
    began = time.monotonic()
    result = ask()
    print(f"{began:.6f} {time.monotonic():.6f} {result}", flush=True)
    time.sleep(0.002)
