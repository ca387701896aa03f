"""Maps of a type that has no batches are read and written all the same: on an old kernel those are
LPM tries; on every kernel, maps of devices."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from pointsman import bpf

pytestmark = pytest.mark.kernel

_DEVMAP_HASH = 25
_LOOPBACK = struct.pack("=I", 1)
_ROOM = 4


@pytest.fixture
def devices(kernel: None) -> Iterator[bpf.Map]:
    found = bpf.Map(bpf.map_create(_DEVMAP_HASH, "pm_devices", 4, 4, _ROOM))
    yield found
    found.close()


def keys(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}I", *numbers)


def test_a_map_without_batches_is_written_and_read_an_element_at_a_time(devices: bpf.Map) -> None:
    assert list(devices.items()) == []
    assert devices.update_batch(keys(1, 2, 3), _LOOPBACK * 3) == 3
    assert dict(devices.items()) == {keys(n): _LOOPBACK for n in (1, 2, 3)}
    assert sum(count for count, _, _ in devices.scan()) == len(devices) == 3
    devices.delete_batch(keys(1, 9, 3))  # 9 is not there
    assert [key for key, _ in devices.items()] == [keys(2)]


def test_a_full_map_without_batches_says_how_much_was_written(devices: bpf.Map) -> None:
    assert devices.update_batch(keys(*range(6)), _LOOPBACK * 6) == _ROOM
    assert len(devices) == _ROOM


def test_other_errors_without_batches_come_out(devices: bpf.Map) -> None:
    with pytest.raises(OSError, match="write pm_devices") as raised:
        devices.update_batch(keys(1), struct.pack("=I", 0x7FFFFFFF))  # no such device
    assert raised.value.errno == errno.EINVAL
