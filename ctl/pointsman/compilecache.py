"""Compiled programs kept as files, so that a start with the same source needs no compiler.

A file's name is the sum of all that decides what is in it. Whatever is wrong with the directory
or a file costs a compilation, never a start.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pointsman import compiled

log = logging.getLogger("pointsman.agent")

#: Another number wherever `Compiled` or what makes it changes.
_FORMAT = 1
_SUFFIX = ".programs"
#: Bytes of all files; a version takes 1 MiB at most.
_ROOM = 32 << 20
_WRITABLE_BY_OTHERS = 0o022


def directory() -> Path:
    """$POINTSMAN_COMPILED, or what systemd gives by CacheDirectory=, or /var/cache/pointsman."""
    if chosen := os.environ.get("POINTSMAN_COMPILED"):
        return Path(chosen)
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    return Path(given or "/var/cache/pointsman")


def key(text: str, flags: Sequence[str], programs: Iterable[str], source: Path) -> str:
    """Of these programs of a module's text, with the headers of `source`/include."""
    headers = sorted(path for path in (source / "include").rglob("*") if path.is_file())
    parts = [
        _FORMAT,
        text,
        [(str(path.relative_to(source)), path.read_text()) for path in headers],
        list(flags),
        list(programs),
        platform.machine(),
        _compiler(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _compiler() -> str:
    """bcc's version, without the LLVM that importing it brings; "" if there is no bcc."""
    found = importlib.util.find_spec("bcc")
    if found is None or found.origin is None:
        return ""
    with contextlib.suppress(OSError):
        text = (Path(found.origin).parent / "version.py").read_text()
        if match := re.search(r"__version__ = '([^']+)'", text):
            return match[1]
    return ""


def read(key: str) -> compiled.Compiled | None:
    """None if there is nothing, or nothing that can be used."""
    path = directory() / f"{key}{_SUFFIX}"
    try:
        if distrust := _distrust(path.parent.lstat(), stat.S_ISDIR):
            log.warning("%s: %s; compiling instead", path.parent, distrust)
            return None
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if distrust := _distrust(os.fstat(file.fileno()), stat.S_ISREG):
                log.warning("%s: %s; compiling instead", path, distrust)
                return None
            found = compiled.decode(file.read())
            with contextlib.suppress(OSError):
                os.utime(file.fileno())
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: %s; compiling instead", path, error)
        return None


def _distrust(status: os.stat_result, is_kind: Callable[[int], bool]) -> str:
    """Why that file must not decide what runs in the kernel, "" if it may."""
    if not is_kind(status.st_mode):
        return "it is of another kind"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return "others may write to it"
    return ""


def write(key: str, value: compiled.Compiled) -> None:
    """In one step; whoever writes the same at once writes an equal file."""
    place = directory()
    temporary = place / f"{key}{_SUFFIX}.{os.getpid()}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _distrust(place.lstat(), stat.S_ISDIR):
            return
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(compiled.encode(value))
            temporary.rename(place / f"{key}{_SUFFIX}")
        finally:
            temporary.unlink(missing_ok=True)
        _sweep(place)
    except OSError as error:
        log.debug("compiled programs are not kept: %s", error)


def _sweep(place: Path) -> None:
    """Leaves the files that were used last."""
    found = []
    for path in place.glob(f"*{_SUFFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            found.append((status.st_mtime_ns, path, status.st_size))
    taken = 0
    for _, path, size in sorted(found, reverse=True):
        taken += size
        if taken > _ROOM:
            path.unlink(missing_ok=True)
