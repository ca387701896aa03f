"""Compiled programs that were kept: what the kernel gets is what the compiler made."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pointsman import abi, bpf, btf, compilecache, compiled, errors, host, loader
from pointsman.hooks import DEVICE_HOOKS, FEATURES, HOOKS, SWEEP
from pointsman.pins import Loaded, Pins
from tests.support.kernel import SMALL

pytestmark = pytest.mark.kernel

PACKETS = (*DEVICE_HOOKS, SWEEP)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("POINTSMAN_COMPILED", str(directory))
    return directory


@pytest.fixture
def pins(kernel: None) -> Iterator[Pins]:
    path = Path("/sys/fs/bpf") / f"pm_compiled_{os.getpid()}"
    host.mount_bpffs(path)
    found = Pins(path, SMALL)
    yield found
    found.unload()


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bcc of the same version, which can't be imported."""
    real, stub = importlib.util.find_spec("bcc"), tmp_path / "stub" / "bcc"
    assert real and real.origin
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('a stub')\n")
    (stub / "version.py").write_bytes((Path(real.origin).parent / "version.py").read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(stub.parent))


def again(pins: Pins, *, packets: bool = False) -> Loaded:
    """As after a boot."""
    pins.unload()
    return pins.load(packets=packets)


def program(loaded: Loaded, name: str) -> bpf.ProgramInfo:
    fd = bpf.obj_get(loaded.generation.programs / name)
    try:
        return bpf.program_info(fd)
    finally:
        os.close(fd)


def shape(info: bpf.MapInfo) -> tuple[object, ...]:
    """All of a map but its number of elements, which the compiler's own does not have. Types by
    what they say: both modules have the maps of sockets, each with ids of its own."""
    types: list[object] = []
    if info.btf_value_type_id:
        raw = bpf.btf(info.btf_id)
        types = [btf.members(raw, i) for i in (info.btf_key_type_id, info.btf_value_type_id)]
    return (info.name, info.type, info.key_size, info.value_size, info.flags, types)


def test_what_is_loaded_is_what_bcc_itself_would_load(pins: Pins, place: Path) -> None:
    """The first time, and from the file."""
    first = pins.load(packets=True)
    assert first.packets, first.packets_error
    names = [hook.name for hook in (*HOOKS, *PACKETS)]
    tags = {name: program(first, name).tag for name in names}
    second = again(pins, packets=True)
    assert {name: program(second, name).tag for name in names} == tags

    import bcc

    sizes, source = SMALL.definitions(), pins.source_directory
    seen = set()
    features = [f for f in FEATURES[0] if f != "HAVE_MPTCP" or second.generation.has("mptcp")]
    for hooks, have in ((HOOKS, features), (PACKETS, ["HAVE_PACKETS"])):
        text = abi.source(source, packets=hooks is PACKETS)
        module = loader.compiler(text, source, loader.flags(sizes, have))
        for hook in hooks:
            made = module.load_func(hook.name.encode(), hook.program_type, None, hook.attach_type)
            assert bpf.program_info(made.fd).tag == tags[hook.name], hook.name
        for name, spec in abi.map_specs(sizes, have, source).items():
            own = bpf.map_info(bcc.lib.bpf_table_fd(module.module, name.encode()))
            with contextlib.closing(bpf.Map.open(second.generation.maps / name)) as ours:
                assert shape(ours.info) == shape(own), name
                assert ours.info.max_entries == spec.entries, name
            seen.add(name)
        module.cleanup()
    assert seen == {path.name for path in second.generation.maps.iterdir()}


def test_what_is_kept_needs_no_compiler(pins: Pins, place: Path, no_compiler: None) -> None:
    with pytest.MonkeyPatch.context() as with_it:
        with_it.delenv("PYTHONPATH")
        pins.load(packets=True)
    loaded = again(pins, packets=True)
    assert (loaded.fresh, loaded.packets, loaded.packets_error) == (True, True, "")
    # Other sizes are another input.
    pins.unload()
    other = replace(pins, sizes=replace(SMALL, buckets=2 * SMALL.buckets))
    with pytest.raises(errors.NoCompiler, match="a stub"):
        other.load()


def test_a_damaged_file_is_told_and_replaced(
    pins: Pins, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pins.load()
    [path] = place.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert again(pins).fresh
    assert any(
        "socket programs" in line and str(path) in line and "damaged" in line
        for line in caplog.messages
    )
    assert compiled.decode(path.read_bytes()).programs == compiled.decode(whole).programs


def test_what_the_kernel_refuses_of_it_is_compiled_anew(pins: Pins, place: Path) -> None:
    tag = program(pins.load(), "connect4").tag
    [path] = place.iterdir()
    whole = compiled.decode(path.read_bytes())
    end = bytes([0x95]) + bytes(7)  # exit, with nothing in R0
    bad = msgspec.structs.replace(whole, programs={**whole.programs, "connect4": end})
    compilecache.write(path.stem, bad)
    assert program(again(pins), "connect4").tag == tag
    assert compiled.decode(path.read_bytes()).programs == whole.programs


def test_what_this_kernel_refused_is_passed_by(pins: Pins, place: Path) -> None:
    """A start on a kernel that lacks a feature compiles nothing that is refused again."""
    pins.load()
    [first] = place.iterdir()
    kernel = f"{platform.release()} {platform.version()}"
    whole = compiled.decode(first.read_bytes())
    compilecache.write(first.stem, msgspec.structs.replace(whole, refused_by=kernel))
    loaded = again(pins)
    assert not loaded.generation.has("mptcp")
    assert len(list(place.iterdir())) == 2
    compilecache.write(first.stem, msgspec.structs.replace(whole, refused_by="Linux 0.1"))
    assert again(pins).generation.has("mptcp")


def test_where_nothing_can_be_kept_programs_load_all_the_same(
    pins: Pins, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.write_text("no directory")
    caplog.set_level("DEBUG", "pointsman.agent")
    assert pins.load().fresh
    assert any("are not kept" in line for line in caplog.messages)
