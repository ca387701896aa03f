"""The files of a directory of manifests: which there are, and what each says now."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

from pointsman.documents import ManifestFile
from pointsman.events import Problem


class Found(NamedTuple):
    """The manifests below a directory with their status, and the paths that cannot be read.

    `root` is (device, inode) of the directory itself; None, and no files, if that is one of them.
    """

    root: tuple[int, int] | None
    files: dict[str, os.stat_result]
    faults: list[Problem]
    unreadable: list[str]


def walk(directory: str) -> Found:
    """Looks at everything below `directory`, and opens no file."""
    while True:
        found = _walk(directory)
        # Had it gone away meanwhile, its files would seem to be deleted.
        if found.root is None or found.root == _identity(directory):
            return found


def _walk(directory: str) -> Found:
    files: dict[str, os.stat_result] = {}
    faults: list[Problem] = []
    unreadable: list[str] = []
    seen: set[tuple[int, int]] = set()
    root = None
    todo = [directory]
    while todo:
        path = todo.pop()
        is_root = path == directory
        try:
            status = os.stat(path)  # noqa: PTH116 - Path would double the time of a scan
            if not stat.S_ISDIR(status.st_mode) and not is_root:
                files[path] = status
                continue
            # Links may lead to where we are: each directory is read once.
            place = status.st_dev, status.st_ino
            if place in seen:
                continue
            seen.add(place)
            with os.scandir(path) as entries:
                todo += sorted((e.path for e in entries if _concerns(e)), reverse=True)
            root = root or place
        except FileNotFoundError:
            if is_root:
                mend = "make it, or name another directory"
                faults.append(Problem("the directory of manifests is missing", mend, path))
                unreadable.append(path)
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            faults.append(Problem(message, "make it readable for this user", path))
            unreadable.append(path)
    return Found(root, files, faults, unreadable)


def _identity(directory: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = Path(directory).stat()
        return status.st_dev, status.st_ino
    return None


def _concerns(entry: os.DirEntry[str]) -> bool:
    """Hidden names are editors' files, and the ..data that a mounted ConfigMap links to."""
    if entry.name.startswith("."):
        return False
    if entry.name.endswith((".yaml", ".yml", ".json")):
        return True
    with contextlib.suppress(OSError):  # a link that leads to itself
        return entry.is_dir()
    return False


def load(path: str, status: os.stat_result, max_bytes: int) -> ManifestFile | None:
    """The file as it is now, of which `max_bytes` at most are read; None if it is gone."""
    # A file that was written just now may be written again within the clock's tick, with
    # nothing in its status to tell: do not take it for known.
    settled = time.time_ns() - status.st_mtime_ns > 100_000_000
    file = ManifestFile(path, signature(status) if settled else None)
    limit = f"{max_bytes} bytes"
    if not stat.S_ISREG(status.st_mode):
        file.lose("it is no regular file", "write a file there")
    elif status.st_size > max_bytes:
        file.lose(f"it has {status.st_size} bytes", f"write files of at most {limit}")
    else:
        try:
            with Path(path).open("rb") as stream:
                data = stream.read(max_bytes + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            file.lose(f"cannot be read: {error.strerror}", "make it readable for this user")
        else:
            if len(data) > max_bytes:
                file.lose(f"it has more than {limit}", f"write files of at most {limit}")
            else:
                file.read(data)
    return file


def signature(status: os.stat_result) -> tuple[int, ...]:
    """What differs between two versions of a file."""
    s = status
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
