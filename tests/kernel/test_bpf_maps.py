"""Maps of a type that has no batches are read and written all the same: on an old kernel those are
LPM tries; on every kernel, maps of devices. And arrays that are read in columns."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from pointsman import bpf
from pointsman.policies import PolicyElement
from pointsman.values import PortName
from tests.support.kernel import TCP, Lab, entry

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


def test_columns_are_what_the_elements_say(lab: Lab) -> None:
    for number in range(3):
        members = [("127.0.0.1", 1 + port) for port in range(40)]
        owner = PortName("default", f"web-{number}", "p")
        lab.set(f"web-{number}", entry(f"10.96.0.{number}", 80, TCP, members, owner))
    maps = lab.maps
    generations = {}
    for first, columns in maps.columns("load", "generation", "until"):
        generations |= dict(enumerate(columns[0], first))
        assert columns[1] == [maps.outcomes(i).until for i in range(first, first + len(columns[1]))]
    assert {i: g for i, g in generations.items() if g} == maps.generations()
    owners = {}
    for first, (column,) in maps.columns("services", "owner"):
        owners |= {i: owner for i, owner in enumerate(column, first) if owner}
    assert list(owners) == maps.owned()
    assert {i: maps.service(i).owner for i in owners} == owners
    (some,) = [each for each in maps.ports_of({("default", "web-1")}, ()) if each]
    assert [name.service for name in some.values()] == ["web-1"]
    (owner,) = some
    assert maps.port_name(owner) == some[owner] and maps.port_name(999) is None
    of_space = [each for some in maps.ports_of((), {"default"}) for each in some.values()]
    assert sorted(each.service for each in of_space) == ["web-0", "web-1", "web-2"]
    assert not any(maps.ports_of({("default", "web-")}, {"defaul"}))
    assert maps.policy_of(owner) == maps.policy_of(10**9) == PolicyElement()
