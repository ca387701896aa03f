"""The short-lived process that compiles one module or finds it compiled, passes the verifier, pins,
prints one line and exits.

bcc brings LLVM, over 100 MB of it: no other process of Pointsman imports it, and this one only to
compile. Run as `python -m pointsman.loader`, with a `Request` as JSON on standard input; prints a
`Reply`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from pointsman import abi, bpf, compilecache
from pointsman.compiled import Compiled, Map, relocated
from pointsman.hooks import (
    COARSE_CLOCK,
    DEVICE_HOOKS,
    FEATURES,
    HELPERS,
    HOOKS,
    NO_PACKETS,
    SWEEP,
    Hook,
)
from pointsman.loading import PACKETS, lacking

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
#: Say nothing about what was to be loaded.
_NO_VERDICT = (errno.EPERM, errno.ENOMEM, errno.EAGAIN, errno.EINTR)


class Refused(Exception):
    """The kernel does not take a program, a map or a type."""


class Failed(Exception):
    """What no other set of features mends. `kind` is the name of an exception of errors.py."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def flags(definitions: dict[str, int], features: Iterable[str]) -> list[str]:
    """The compiler's."""
    # Debian keeps the asm/ headers of the UAPI in the multiarch folder.
    triplet = f"/usr/include/{platform.machine()}-linux-gnu"
    found = ["-isystem", "/usr/include", "-isystem", triplet, "-Wno-unused-value"]
    found += [f"-D{name}={value}" for name, value in definitions.items()]
    return found + [f"-D{name}" for name in features]


def compiler(text: str, directory: Path, given: list[str]) -> Any:
    """A module of bcc's. Raises Failed."""
    os.environ["BCC_KERNEL_SOURCE"] = str(directory)
    try:
        import bcc
    except ImportError as error:
        raise Failed(
            "NoCompiler",
            f"bcc can't be imported ({error}); install python3-bpfcc and run Pointsman "
            "from a venv made by /usr/bin/python3 with --system-site-packages",
        ) from None
    try:
        return bcc.BPF(text=text.encode(), cflags=given)
    except Exception as error:  # bcc raises nothing more precise
        raise Failed("NoCompiler", f"bcc: {error}") from None


def taken_from(module: Any, hooks: Iterable[Hook]) -> Compiled:
    """What bcc made of a source, with its own maps, which nobody else uses."""
    import bcc

    library, handle = bcc.lib, ctypes.c_void_p(module.module)
    library.bpf_table_name.restype = ctypes.c_char_p
    maps: list[Map] = []
    places, types = {}, b""
    for number in range(library.bpf_num_tables(handle)):
        fd = library.bpf_table_fd_id(handle, ctypes.c_size_t(number))
        name = library.bpf_table_name(handle, ctypes.c_size_t(number)).decode()
        info = bpf.map_info(fd)
        places[fd] = len(maps)
        sizes = (info.key_size, info.value_size, info.max_entries, info.flags)
        ids = (info.btf_key_type_id, info.btf_value_type_id)
        maps.append(Map(name, info.type, *sizes, *ids))
        types = types or (bpf.btf(info.btf_id) if info.btf_id else b"")
    programs = {h.name: relocated(module.dump_func(h.name.encode()), places) for h in hooks}
    return Compiled(tuple(maps), programs, types, library.bpf_module_license(handle).decode())


def install(
    compiled: Compiled, hooks: list[Hook], specs: dict[str, abi.MapSpec], programs: Path, maps: Path
) -> None:
    """Loads and pins: the maps of `specs`, as far as they are not pinned, and a program for each
    hook. Nothing is pinned before the kernel has taken everything. Raises Refused, OSError."""
    with contextlib.ExitStack() as opened:

        def own(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        numbers: dict[int, int] = {}
        made: dict[Path, int] = {}
        loaded: dict[str, int] = {}
        for place, one in enumerate(compiled.maps):
            if (maps / one.name).exists():
                numbers[place] = own(bpf.obj_get(maps / one.name))
        try:
            types = own(bpf.btf_load(compiled.types)) if compiled.types else -1
            for place, one in enumerate(compiled.maps):
                if place in numbers:
                    continue
                spec = specs.get(one.name)
                numbers[place] = own(
                    bpf.map_create(
                        one.type,
                        one.name,
                        one.key_size,
                        one.value_size,
                        spec.entries if spec else one.entries,
                        flags=one.flags,
                        types=(types, one.key_type, one.value_type) if one.value_type else None,
                    )
                )
                if spec:
                    made[maps / one.name] = numbers[place]
            for hook in hooks:
                code = relocated(compiled.programs[hook.name], numbers)
                kind, attach_type = hook.program_type, hook.attach_type
                loaded[hook.name] = own(
                    bpf.program_load(kind, hook.name, compiled.license, code, attach_type)
                )
        except OSError as error:
            if error.errno in _NO_VERDICT:
                raise
            raise Refused(str(error)) from None
        for path, fd in made.items():
            bpf.obj_pin(fd, path)
        for name, fd in loaded.items():
            (programs / name).unlink(missing_ok=True)
            bpf.obj_pin(fd, programs / name)


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Pins a module, compiling it if that is needed. The reply has `features`, or `error` and
    `kind` (the name of an exception)."""
    directory = Path(request["source"])
    # Before 5.11 maps count against this limit; without CAP_SYS_RESOURCE it stays as it is.
    with contextlib.suppress(ValueError):
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    packets = request["module"] == PACKETS
    text = abi.source(directory, packets=packets)
    if packets:
        hooks = [*DEVICE_HOOKS, SWEEP]
        variants: tuple[tuple[str, ...], ...] = (("HAVE_PACKETS",),)
    else:
        hooks = [*HOOKS, *(h for h in HELPERS if h.name in request["helpers"])]
        # Compiling takes longest: what needs something that is known to lack is not tried.
        lacks = set(lacking())
        variants = tuple(v for v in FEATURES if lacks.isdisjoint(v))
    try:
        if not text:
            raise Failed("NoCompiler", f"{directory} has no packets.c")
        if packets and not bpf.has_helper(*COARSE_CLOCK):
            raise Failed("KernelTooOld", NO_PACKETS)
        # The second time, all is compiled: who is to read why wants the lines of the source.
        for passing in (True, False):
            found, failure = _first(request, text, variants, hooks, passing=passing)
            if found is not None:
                return {"features": list(found)}
            if failure:
                break
        return {"kind": "KernelTooOld", "error": failure}
    except Failed as error:
        return {"kind": error.kind, "error": str(error)}
    except OSError as error:
        kind = "NotRoot" if error.errno == errno.EPERM else "PointsmanError"
        return {"kind": kind, "error": str(error)}


def _first(
    request: dict[str, Any],
    text: str,
    variants: tuple[tuple[str, ...], ...],
    hooks: list[Hook],
    *,
    passing: bool,
) -> tuple[tuple[str, ...] | None, str]:
    """The first set of features that the kernel takes, or None and why it refused the last, "" if
    that was not asked. `passing` those by that this kernel is known to have refused."""
    directory, definitions = Path(request["source"]), request["definitions"]
    programs, maps = Path(request["programs"]), Path(request["maps"])
    kernel = f"{platform.release()} {platform.version()}"
    failure = ""
    for features in variants:
        given = flags(definitions, (*features, *request["features"]))
        key = compilecache.key(text, given, [hook.name for hook in hooks], directory)
        specs = abi.map_specs(definitions, features, directory)
        kept = compilecache.read(key)
        if kept and kept.refused_by == kernel:
            if passing:
                failure = ""
                continue
        elif kept:
            # If it is refused, what made it may be to blame: another kernel's types.
            with contextlib.suppress(Refused):
                install(kept, hooks, specs, programs, maps)
                return features, ""
        module = compiler(text, directory, given)
        fresh = taken_from(module, hooks)
        compilecache.write(key, fresh)  # now: the verifier may not have the time to end
        try:
            install(fresh, hooks, specs, programs, maps)
        except Refused as error:
            compilecache.write(key, msgspec.structs.replace(fresh, refused_by=kernel))
            failure = str(error)
            _explain(module, hooks)
        else:
            return features, ""
    return None, failure


def _explain(module: Any, hooks: list[Hook]) -> None:
    """bcc prints the verifier's log with the lines of the source, which only it has."""
    with contextlib.suppress(Exception):
        for hook in hooks:
            module.load_func(hook.name.encode(), hook.program_type, None, hook.attach_type)


class _Kept(logging.Handler):
    """For the agent to log: this process's standard error is shown only if it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


def main() -> None:
    # An agent that is killed takes its loader along: two must not pin at once.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    # The compiler writes to file descriptor 1 at times: keep the one line of the reply apart.
    reply_to = os.dup(1)
    os.dup2(2, 1)
    kept = _Kept()
    logging.getLogger("pointsman").addHandler(kept)
    logging.getLogger("pointsman").setLevel(logging.DEBUG)
    reply = load(request)
    os.write(reply_to, json.dumps({**reply, "log": kept.said}).encode() + b"\n")


if __name__ == "__main__":
    main()
