"""The objects that were in force when the agent last ran, so that a restart, too, keeps the last
good version of what is bad by then."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pointsman.objects import EndpointSlice, Namespace, Node, Object, Pod, Service

log = logging.getLogger("pointsman.lastgood")


class _Saved(msgspec.Struct, frozen=True):
    """Objects by kind, each with the file that it is from."""

    services: list[tuple[str, Service]]
    slices: list[tuple[str, EndpointSlice]]
    pods: list[tuple[str, Pod]]
    #: Not in what an older version saved.
    nodes: list[tuple[str, Node]] = []
    namespaces: list[tuple[str, Namespace]] = []
    #: The file system (st_dev) on which the directory of manifests was.
    device: int = 0


def save(path: Path, in_force: Iterable[tuple[str, Object]], device: int = 0) -> None:
    """Replaces the file in one step. A failure is logged: it matters only at the next start."""
    found = list(in_force)
    saved = _Saved(
        [(file, obj) for file, obj in found if isinstance(obj, Service)],
        [(file, obj) for file, obj in found if isinstance(obj, EndpointSlice)],
        [(file, obj) for file, obj in found if isinstance(obj, Pod)],
        [(file, obj) for file, obj in found if isinstance(obj, Node)],
        [(file, obj) for file, obj in found if isinstance(obj, Namespace)],
        device,
    )
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(msgspec.json.encode(saved))
        temporary.rename(path)
    except OSError as error:
        log.warning("the last good objects could not be saved: %s", error)


def load(path: Path) -> list[tuple[str, Object]]:
    """(file, object) of each; nothing if there is no such file or it is not what `save` wrote."""
    saved = _read(path)
    return [*saved.services, *saved.slices, *saved.pods, *saved.nodes, *saved.namespaces]


def had_objects(path: Path, directory: Path, *, not_on: int) -> bool:
    """Whether the directory had files when it was saved, on another file system than this."""
    saved = _read(path)
    return saved.device not in (0, not_on) and any(
        Path(file).is_relative_to(directory) for file, _ in load(path)
    )


def _read(path: Path) -> _Saved:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError):
        return _Saved([], [], [])
