"""What the programs for sockets are compiled to without what later kernels have: Linux 5.10 knows
all of it. The kernel that runs the tests may take more, so the instructions themselves are read."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from pointsman import abi, loader
from pointsman.hooks import FEATURES, HELPERS, HOOKS
from tests.support.kernel import SMALL

pytestmark = pytest.mark.kernel

#: Without merge_load, which upgrades alone have compiled.
PROGRAMS = (*HOOKS, *(hook for hook in HELPERS if hook.name != "merge_load"))
LAST_HELPER = 155  # bpf_redirect_peer(), the last of enum bpf_func_id in 5.10's linux/bpf.h
_CALL, _LD_IMM64, _ATOMICS = 0x85, 0x18, (0xC3, 0xDB)  # u32 and u64


def unknown(code: bytes) -> Iterator[str]:
    """Calls and atomic operations that 5.10 does not know. Of the latter it has an addition that
    tells nothing, and no other."""
    at = 0
    while at < len(code):
        kind, registers, _offset, number = struct.unpack_from("=BBhi", code, at)
        if kind == _CALL and (registers >> 4 or number > LAST_HELPER):
            yield f"{at // 8}: calls {number} (of kind {registers >> 4})"
        elif kind in _ATOMICS and number:
            yield f"{at // 8}: atomic operation {number:#x}"
        at += 16 if kind == _LD_IMM64 else 8


@pytest.fixture(scope="module")
def plain(kernel: None) -> dict[str, bytes]:
    """The programs without any feature, by name; none is loaded."""
    source = abi.source_directory()
    given = loader.flags(SMALL.definitions(), FEATURES[-1])
    module = loader.compiler(abi.source(source), source, given)
    try:
        return loader.taken_from(module, PROGRAMS).programs
    finally:
        module.cleanup()


@pytest.mark.parametrize("name", [hook.name for hook in PROGRAMS])
def test_linux_5_10_knows_all_calls_and_atomic_operations(
    plain: dict[str, bytes], name: str
) -> None:
    assert not list(unknown(plain[name]))
