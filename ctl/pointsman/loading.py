"""Runs the loader, a process for each module: what crashes it, hangs it or has it killed takes no
other module along, and no two compilers are in memory at once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from pointsman import bpf, errors
from pointsman.hooks import LOST, SET_RETVAL, SKC_TO_MPTCP_SOCK

log = logging.getLogger("pointsman.agent")

#: Names of modules, as errors have them.
SOCKETS, PACKETS = "socket", "packet"
#: The oldest Linux that is known to load them: docs/kernels.md.
_OLDEST = {SOCKETS: "5.10", PACKETS: "6.1"}
#: Seconds for each. The verifier needs some for packets, and many times that on a busy machine; a
#: startup probe must have more patience than this. An emulated machine takes longer still.
TIMEOUT = 120.0
_VARIABLE = "POINTSMAN_LOAD_TIMEOUT"
_ATTEMPTS = 3
_LOOK = 0.2  # seconds between two looks whether it is to end


class Stopped(Exception):
    """Whoever waited for the loader is to end; so has the loader."""


def load(module: str, request: Mapping[str, Any], stop: threading.Event) -> None:
    """Compiles and pins one module; `request` is what `pointsman.loader` reads beside its name.
    Raises the error of `pointsman.errors` that says why it could not be, Stopped if `stop` is set
    before it is done."""
    timeout = _timeout()
    for attempt in range(_ATTEMPTS):
        reply, told = _run({**request, "module": module}, timeout, stop)
        for level, text in reply.get("log", ()):
            log.log(level, "%s programs: %s", module, text)
        if "error" not in reply:
            if module == SOCKETS:
                for name in sorted(LOST.keys() - reply["features"]):
                    log.warning("on this kernel (%s) %s", platform.release(), LOST[name])
            return
        # The loader of an agent that was killed a moment ago may still have been pinning.
        if not any("File exists" in line for line in (reply["error"], *told)):
            break
        if attempt + 1 < _ATTEMPTS:
            time.sleep(0.5)
    kind: type[errors.PointsmanError] = getattr(errors, reply["kind"])
    message = f"the {module} programs could not be loaded: {reply['error']}"
    if kind is errors.KernelTooOld:
        known = f"they are known to load on Linux {_OLDEST[module]} and newer"
        message += f" ({known}; this is {platform.release()})"
    raise kind("\n  ".join([message, *_telling(told)]))


def lacking() -> tuple[str, ...]:
    """Of the features in LOST those that this kernel has not, by trying; they cost no load."""
    there = {
        "HAVE_SET_RETVAL": bpf.has_helper(*SET_RETVAL),
        "HAVE_COMPARE_AND_SWAP": bpf.compares_and_swaps(),
        "HAVE_MPTCP": bpf.has_helper(*SKC_TO_MPTCP_SOCK),
    }
    return tuple(name for name, found in there.items() if not found)


def _timeout() -> float:
    """TIMEOUT, or what the environment says. Raises PointsmanError."""
    text = os.environ.get(_VARIABLE, str(TIMEOUT))
    try:
        found = float(text)
    except ValueError:
        found = 0
    if not 0 < found <= 86400:
        raise errors.PointsmanError(
            f"{_VARIABLE}: {text!r} is no number of seconds; write e.g. 600"
        )
    return found


def _run(
    request: Mapping[str, Any], timeout: float, stop: threading.Event
) -> tuple[dict[str, Any], list[str]]:
    """The loader's reply, and what the compiler and the verifier said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pointsman.loader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with process:
        try:
            said, told = _talk(process, json.dumps(request), timeout, stop)
        except subprocess.TimeoutExpired as error:
            # Of what it has printed until then only bytes are left.
            told = (error.stderr or b"").decode(errors="replace")
            message = f"the compiler was ended, because it had not finished after {timeout:g} s"
            return {"kind": "NoCompiler", "error": message}, told.strip().splitlines()
        finally:
            process.kill()  # does nothing to one that has ended
    try:
        reply: dict[str, Any] = json.loads(said)
    except ValueError:
        reply = {"kind": "NoCompiler", "error": f"the compiler {_ended(process.returncode)}"}
    return reply, told.strip().splitlines()


def _talk(
    process: subprocess.Popen[str], request: str, timeout: float, stop: threading.Event
) -> tuple[str, str]:
    """What it prints on both its outputs. Raises TimeoutExpired, and Stopped."""
    until = time.monotonic() + timeout
    # Not by `communicate`: called again it does not send the rest.
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
    while True:
        left = until - time.monotonic()
        try:
            return process.communicate(timeout=max(0.0, min(left, _LOOK)))
        except subprocess.TimeoutExpired:
            if left <= 0:
                raise
        if stop.is_set():
            raise Stopped


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    name = signal.Signals(-code).name
    hint = "; was there too little memory for it?" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _telling(lines: list[str], room: int = 12) -> list[str]:
    """The part that says why: a compiler's first error, whose followers it may have caused, or
    the end of the verifier's log."""
    first = next((i for i, line in enumerate(lines) if " error: " in line), None)
    return lines[-room:] if first is None else lines[first : first + room]
