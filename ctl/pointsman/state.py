"""Files that the agent leaves for its next start and for the commands: status, claims, lock."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointsman.choice import Kept
from pointsman.errors import AlreadyRunning
from pointsman.objects import Ref

STATUS = "status.json"
CLAIMS = "cluster-ips.json"
ANNOTATIONS = "annotations.json"
LAST_GOOD = "last-good.json"
RESERVED = "reserved-ports.json"
LOCK = "agent.lock"
_PATIENCE = 1.0  # seconds for a lock
_UID = "uid"  # beside the annotations, whose names have a prefix with a slash


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Replaces the file in one step: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.rename(path)


def read_json(path: Path) -> Any:
    """The file's value, None if there is none or it can't be read as JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def told_at(directory: Path) -> int:
    """When an agent wrote its status last, in ns; 0 if none has."""
    try:
        return (directory / STATUS).stat().st_mtime_ns
    except OSError:
        return 0


def read_claims(directory: Path) -> dict[str, Ref]:
    """Address → the Service that owned it when the agent last ran."""
    saved = read_json(directory / CLAIMS) or {}
    claims = {}
    for address, owner in saved.items() if isinstance(saved, dict) else ():
        namespace, _, name = str(owner).partition("/")
        claims[address] = Ref("Service", namespace, name)
    return claims


def write_claims(directory: Path, claims: Mapping[str, Ref]) -> None:
    owners = {address: f"{ref.namespace}/{ref.name}" for address, ref in sorted(claims.items())}
    write_json(directory / CLAIMS, owners, durable=True)


def read_annotations(directory: Path) -> dict[Ref, Kept]:
    """By object, the last good values of annotations that were bad when the agent last ran."""
    saved, kept = read_json(directory / ANNOTATIONS), {}
    for key, found in saved.items() if isinstance(saved, dict) else ():
        if isinstance(found, dict) and (ref := Ref.parse(key)):
            texts = {name: text for name, text in found.items() if isinstance(text, str)}
            kept[ref] = Kept(texts.pop(_UID, ""), texts)
    return kept


def write_annotations(directory: Path, kept: Mapping[Ref, Kept]) -> None:
    saved = {}
    for ref, (uid, texts) in sorted(kept.items()):
        saved[str(ref)] = {_UID: uid, **texts} if uid else texts
    write_json(directory / ANNOTATIONS, saved)


def read_reserved(directory: Path) -> tuple[tuple[int, int], ...]:
    """The port ranges that an agent reserved since this machine started."""
    saved = read_json(directory / RESERVED)
    return tuple((int(first), int(last)) for first, last in saved or ())


def write_reserved(directory: Path, ranges: tuple[tuple[int, int], ...]) -> None:
    write_json(directory / RESERVED, ranges)


class Lock:
    """Held by the one process that may write the maps: of its run directory, and by `pins` of what
    is pinned. Ends with the process. Both raise AlreadyRunning."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._path = directory / LOCK
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(self._fd)
        except OSError:
            pid = os.read(self._fd, 32).decode().strip() or "?"
            os.close(self._fd)
            raise AlreadyRunning(
                f"an agent (pid {pid}) holds {self._path}; stop it first, or choose other "
                "directories with --run-dir and --bpffs"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())
        self._pins = -1

    def pins(self, root: Path) -> None:
        """Takes a pin directory as well: two run directories may come with one of these."""
        self._pins = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(self._pins)
        except OSError:
            raise AlreadyRunning(
                f"an agent with another --run-dir holds {root}; stop it first, or choose another "
                "directory with --bpffs"
            ) from None

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
        if self._pins >= 0:
            os.close(self._pins)


def _lock(fd: int) -> None:
    """Raises OSError if another process has it, and not only for a moment: a command that asks
    whether an agent runs, or a child of one that was killed, on its way to become a loader."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def running(directory: Path) -> int | None:
    """The pid of the agent that holds the lock, None if none does."""
    try:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return int(os.read(fd, 32).decode().strip() or 0)
    else:
        return None
    finally:
        os.close(fd)
