"""The short-lived process that compiles one module, passes the verifier, pins, prints one line and
exits.

bcc brings LLVM, over 100 MB of it: no other process of Pointsman imports it. Run as
`python -m pointsman.loader`, with a `Request` as JSON on standard input; prints a `Reply`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from pointsman import abi, bpf
from pointsman.hooks import (
    COARSE_CLOCK,
    DEVICE_HOOKS,
    FEATURES,
    HELPERS,
    HOOKS,
    NO_PACKETS,
    SET_RETVAL,
    SWEEP,
    Hook,
)
from pointsman.loading import PACKETS

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def _flags(request: dict[str, Any], features: tuple[str, ...]) -> list[str]:
    # Debian keeps the asm/ headers of the UAPI in the multiarch folder.
    triplet = f"/usr/include/{platform.machine()}-linux-gnu"
    flags = ["-isystem", "/usr/include", "-isystem", triplet, "-Wno-unused-value"]
    flags.append(f'-DPINS="{request["maps"]}"')
    flags += [f"-D{name}={value}" for name, value in request["definitions"].items()]
    flags += [f"-D{name}" for name in (*features, *request["features"])]
    return flags


def _pin_program(loaded: Any, hook: Hook, directory: Path) -> None:
    function = loaded.load_func(hook.name.encode(), hook.program_type, None, hook.attach_type)
    path = directory / hook.name
    path.unlink(missing_ok=True)
    bpf.obj_pin(function.fd, path)


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles and pins a module. The reply has `features`, or `error` and `kind` (the name of an
    exception)."""
    directory = Path(request["source"])
    os.environ["BCC_KERNEL_SOURCE"] = str(directory)
    try:
        import bcc
    except ImportError as error:
        return {
            "kind": "NoCompiler",
            "error": f"bcc can't be imported ({error}); install python3-bpfcc and run Pointsman "
            "from a venv made by /usr/bin/python3 with --system-site-packages",
        }
    # Before 5.11 maps count against this limit; without CAP_SYS_RESOURCE it stays as it is.
    with contextlib.suppress(ValueError):
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    if request["module"] == PACKETS:
        text = abi.source(directory, packets=True)
        if not text:
            return {"kind": "NoCompiler", "error": f"{directory} has no packets.c"}
        if not bpf.has_helper(*COARSE_CLOCK):
            return {"kind": "KernelTooOld", "error": NO_PACKETS}
        return _module(bcc, text, request, (("HAVE_PACKETS",),), [*DEVICE_HOOKS, SWEEP])
    wanted = [*HOOKS, *(h for h in HELPERS if h.name in request["helpers"])]
    # Compiling takes longest: what needs a helper that is not there is not tried.
    without = () if bpf.has_helper(*SET_RETVAL) else ("HAVE_SET_RETVAL",)
    variants = tuple(found for found in FEATURES if not set(without) & set(found))
    return _module(bcc, abi.source(directory), request, variants, wanted)


def _module(
    bcc: Any,
    text: str,
    request: dict[str, Any],
    variants: tuple[tuple[str, ...], ...],
    hooks: list[Hook],
) -> dict[str, Any]:
    """One compilation, with the first set of features that the kernel takes. The reply as above."""
    failure = ""
    for features in variants:
        try:
            module = bcc.BPF(text=text.encode(), cflags=_flags(request, features))
        except Exception as error:  # bcc raises nothing more precise
            return {"kind": "NoCompiler", "error": f"bcc: {error}"}
        try:
            for hook in hooks:
                _pin_program(module, hook, Path(request["programs"]))
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPERM:
                return {"kind": "NotRoot", "error": str(error)}
            failure = str(error)
            continue
        return {"features": list(features)}
    return {"kind": "KernelTooOld", "error": failure}


def main() -> None:
    # An agent that is killed takes its loader along: two must not pin at once.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    # The compiler writes to file descriptor 1 at times: keep the one line of the reply apart.
    reply_to = os.dup(1)
    os.dup2(2, 1)
    reply = load(request)
    os.write(reply_to, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
