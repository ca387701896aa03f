"""A pin directory that one test after the other uses, so that its programs are compiled once.

Programs belong to the maps they were compiled for, so the maps stay as well: `as_new` empties them
and takes away all else. The next agent finds what `pointsman load` leaves on a fresh node.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from pathlib import Path

from pointsman import bpf
from pointsman.attach import DeviceLinks
from pointsman.pins import Generation, Pins

_HASH, _ARRAY, _PERCPU_ARRAY, _LRU_HASH = 1, 2, 6, 9  # enum bpf_map_type


def as_new(root: Path) -> None:
    """Detaches, and leaves nothing but programs of today's source with empty maps."""
    pins = Pins(root)
    DeviceLinks(root).remove_all()
    shutil.rmtree(root / "links", ignore_errors=True)
    for name in ("current", "next"):
        (root / name).unlink(missing_ok=True)
    kept = Generation(root / f"g_{pins.fingerprint()}")
    # With merge_load they were compiled for an upgrade.
    if (kept.programs / "merge_load").exists():
        shutil.rmtree(kept.directory)
    pins.drop_others(kept)
    if kept.directory.exists():
        pins.drop_packets(kept)
        for path in kept.maps.iterdir():
            with contextlib.closing(bpf.Map.open(path)) as found:
                _empty(found)


def _empty(found: bpf.Map) -> None:
    info = found.info
    if info.type in (_HASH, _LRU_HASH):
        for key in [key for key, _ in found.items()]:
            found.delete(key)
    elif info.type == _ARRAY:
        keys = struct.pack(f"={info.max_entries}I", *range(info.max_entries))
        found.update_batch(keys, bytes(info.value_size * info.max_entries))
    elif info.type == _PERCPU_ARRAY:
        for number in range(info.max_entries):
            nothing = bytes(-(-info.value_size // 8) * 8 * bpf.possible_cpus())
            found.update(struct.pack("=I", number), nothing)
