"""What is pinned where, how it gets there, and how it goes.

    <root>/                       mode 0700, root's
        g_<fingerprint>/          one generation: one source, one set of sizes, one kernel
            programs/<hook>
            maps/<name>           the same maps as before where their layout did not change
        current -> g_<fingerprint>
        links/<hook>              what runs; flipped one at a time, each atomically

A generation is complete before anything points to it. Every step can be the last one (kill -9):
the next start finds the same fingerprint and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pointsman import abi, bpf, btf, errors
from pointsman.attach import DeviceLinks
from pointsman.hooks import DEVICE_HOOKS, FEATURES, HELPERS, HOOKS, SWEEP, DeviceLink, Link
from pointsman.marks import words_for

#: Rebuilt whole in a new generation when one of them changes: they hold each other's numbers.
LOOKUP_MAPS = ("frontends", "services", "slots", "names", "marks", "maglev", "source_ranges")
#: Describe live sockets: they pass from generation to generation and can't be rebuilt.
RECORD_MAPS = (
    "sockets",
    "sockets_more",
    "sockets_overflow",
    "overflow_netns",
    "datagrams",
    "mptcp",
    "flows",
)
_PACKETS = "HAVE_PACKETS"
_PACKET_PROGRAMS = tuple(hook.name for hook in (*DEVICE_HOOKS, SWEEP))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many elements the maps have. Arrays are allocated whole when created."""

    services: int = 65536
    slots: int = 131072
    endpoints: int = 65536
    buckets: int = 16384
    overflow: int = 16384
    lines: int = 32768
    flows: int = 262144
    flows_new: int = 131072

    def definitions(self) -> dict[str, int]:
        """The MAX_… definitions of bpf/maps.h."""
        return {
            "MAX_SERVICES": self.services,
            "MAX_MARKS": words_for(self.services),
            "MAX_SLOTS": self.slots,
            "MAX_ENDPOINTS": self.endpoints,
            "MAX_BUCKETS": self.buckets,
            "MAX_OVERFLOW": self.overflow,
            "MAX_OVERFLOW_NETNS": 4096,
            "MAX_MPTCP": 16384,
            "MAX_AFFINITY": 65536,
            "MAX_SKIPPED": 4096,
            "MAX_LINES": self.lines,
            "MAX_SOURCE_RANGES": 16384,
            "MAX_FLOWS": self.flows,
            "MAX_FLOWS_NEW": self.flows_new,
            "MAX_FRAGMENTS": 8192,
            "MAX_DEVICES": 256,
            "MAX_TRACE_BYTES": 1 << 20,
            "MAX_SWEEP": 128,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """One directory of programs and maps."""

    directory: Path

    @property
    def programs(self) -> Path:
        return self.directory / "programs"

    @property
    def maps(self) -> Path:
        return self.directory / "maps"

    @property
    def name(self) -> str:
        return self.directory.name.removeprefix("g_")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` made or found. `previous`: what runs now, if that is another generation."""

    generation: Generation
    compiled: bool
    previous: Generation | None = None
    rebuilt: tuple[str, ...] = ()  # maps that start empty, to be filled before anything flips
    packets: bool = False  # whether the programs for packets are there
    packets_error: str = ""  # why they are not, although they were asked for


@dataclass(slots=True)
class Pins:
    """The pin directory. Methods raise the errors of `pointsman.errors`."""

    root: Path
    sizes: Sizes = field(default_factory=Sizes)
    source_directory: Path = field(default_factory=abi.source_directory)

    # -- reading -----------------------------------------------------------------------------

    @property
    def current(self) -> Generation | None:
        """The generation that runs, or that the last complete load left."""
        link = self.root / "current"
        if not link.is_symlink():
            return None
        target = self.root / link.readlink()
        return Generation(target) if target.is_dir() else None

    def require_current(self) -> Generation:
        generation = self.current
        if generation is None:
            raise errors.NotLoaded(
                f"nothing is loaded under {self.root}; run 'pointsman up' (or 'pointsman load')"
            )
        return generation

    def links(self) -> list[Link]:
        """The state of every hook, in the order of HOOKS."""
        generation = self.current
        return [self._link(hook.name, generation) for hook in HOOKS]

    def device_links(self) -> list[DeviceLink]:
        """What is attached to devices of this network namespace, by the names of the pins."""
        generation = self.current
        current: dict[str, int] = {}
        for hook in DEVICE_HOOKS:
            with contextlib.suppress(FileNotFoundError):
                if generation:
                    current[hook.name] = self._program_id(generation, hook.name)
        return [
            replace(link, current=link.program == current.get(link.hook))
            for link in DeviceLinks(self.root).present()
        ]

    def _link(self, hook: str, generation: Generation | None) -> Link:
        try:
            fd = bpf.obj_get(self.root / "links" / hook)
        except FileNotFoundError:
            return Link(hook)
        try:
            program, cgroup = bpf.link_program(fd), bpf.link_cgroup(fd)
        finally:
            os.close(fd)
        current = generation is not None and program == self._program_id(generation, hook)
        return Link(hook, program, cgroup, current)

    @staticmethod
    def _program_id(generation: Generation, hook: str) -> int:
        fd = bpf.obj_get(generation.programs / hook)
        try:
            return bpf.program_info(fd).id
        finally:
            os.close(fd)

    def fingerprint(self) -> str:
        """Names a generation: equal source, sizes and kernel need no compiling."""
        text = json.dumps(
            [
                abi.source(self.source_directory),
                abi.source(self.source_directory, packets=True),
                self.sizes.definitions(),
                platform.release(),
                platform.version(),
                platform.machine(),
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    # -- loading -----------------------------------------------------------------------------

    def prepare_root(self) -> None:
        """Makes the root directory 0700; refuses one that somebody else could write to."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.lstat()
        except PermissionError as error:
            raise errors.NotRoot(f"{error}; run as root") from None
        except OSError as error:
            raise errors.NoBpffs(f"{error}; is bpffs mounted at {self.root.parent}?") from None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise errors.NoBpffs(
                f"{self.root} belongs to user {status.st_uid} or is no directory; remove it, or "
                "choose another with --bpffs"
            )
        if stat.S_IMODE(status.st_mode) != 0o700:
            self.root.chmod(0o700)

    def load(self, *, packets: bool = False) -> Loaded:
        """Pins programs and maps of this source and these sizes, compiling if that is needed.
        Changes nothing that runs. Call with the agent's lock held.

        `packets`: those for packets as well. If the kernel or the compiler does not take them,
        sockets are served without: `packets_error` says why.
        """
        self.prepare_root()
        generation = Generation(self.root / f"g_{self.fingerprint()}")
        previous = self.current
        if previous == generation:
            previous = None
        missing = [] if self._complete(generation) else ["sockets"]
        if packets and not self._complete_packets(generation):
            missing.append("packets")
        error = ""
        if missing:
            generation.programs.mkdir(parents=True, exist_ok=True)
            generation.maps.mkdir(exist_ok=True)
            self._inherit_maps(generation, previous, packets=packets)
            error = self._compile(generation, missing)
        packets = packets and not error
        self._check(generation, self._specs(generation, packets=packets))
        rebuilt: tuple[str, ...] = ()
        if previous:
            rebuilt = tuple(
                name
                for name in (*LOOKUP_MAPS, "load")
                if not _same_map(previous.maps / name, generation.maps / name)
            )
        elif self.current is None:
            self._point_to(generation)
        return Loaded(generation, bool(missing), previous, rebuilt, packets, error)

    def _specs(self, generation: Generation, *, packets: bool = False) -> dict[str, abi.MapSpec]:
        features = [f for f in FEATURES[0] if f != "HAVE_MPTCP" or _exists(generation, "mptcp")]
        features += [_PACKETS] if packets else []
        return abi.map_specs(self.sizes.definitions(), features, self.source_directory)

    def _complete_packets(self, generation: Generation) -> bool:
        return all((generation.programs / name).exists() for name in _PACKET_PROGRAMS) and all(
            _exists(generation, name) for name in self._specs(generation, packets=True)
        )

    def _complete(self, generation: Generation) -> bool:
        names = [hook.name for hook in HOOKS] + ["set_generation"]
        if _exists(generation, "previous_load"):
            names.append("merge_load")
        return all((generation.programs / name).exists() for name in names) and all(
            (generation.maps / name).exists() for name in self._specs(generation)
        )

    def _inherit_maps(
        self, generation: Generation, previous: Generation | None, *, packets: bool
    ) -> None:
        """Pins those maps of the running generation again that fit as they are."""
        features = (*FEATURES[0], _PACKETS) if packets else FEATURES[0]
        specs = abi.map_specs(self.sizes.definitions(), features, self.source_directory)
        present = {name: generation.maps / name for name in specs}
        self._check(generation, {n: s for n, s in specs.items() if present[n].exists()})
        if previous is None:
            return
        unlike = {
            name: found
            for name, spec in specs.items()
            if _exists(previous, name) and (found := differences(spec, previous.maps / name))
        }
        refused = [line for name in RECORD_MAPS for line in unlike.get(name, ())]
        if refused:
            raise errors.LayoutMismatch(
                "the records of live sockets or flows have another layout: "
                + "; ".join(refused)
                + "; run 'pointsman unload' first, or stay with the former version and sizes"
            )
        if any(name in unlike for name in (*LOOKUP_MAPS, "load")):
            unlike.update((name, ["rebuilt with the others"]) for name in LOOKUP_MAPS)
        for name in specs:
            if name not in unlike and _exists(previous, name) and not present[name].exists():
                _pin_again(previous.maps / name, present[name])
        if "load" in unlike and not _exists(generation, "previous_load"):
            _pin_again(previous.maps / "load", generation.maps / "previous_load")

    def _check(self, generation: Generation, specs: Mapping[str, abi.MapSpec]) -> None:
        found = [
            line
            for name, spec in specs.items()
            for line in differences(spec, generation.maps / name)
        ]
        if found:
            raise errors.LayoutMismatch(
                "pinned maps differ from what the programs expect: "
                + "; ".join(found)
                + f"; run 'pointsman unload', or remove {generation.directory}"
            )

    def _compile(self, generation: Generation, modules: list[str]) -> str:
        """Why the programs for packets could not be loaded, "" if they were, or weren't asked."""
        migrating = _exists(generation, "previous_load")
        request = {
            "source": str(self.source_directory),
            "programs": str(generation.programs),
            "maps": str(generation.maps),
            "definitions": {
                **self.sizes.definitions(),
                **(_previous_load(generation.maps / "previous_load") if migrating else {}),
            },
            "features": ["HAVE_PREVIOUS_LOAD"] if migrating else [],
            "helpers": [h.name for h in HELPERS if migrating or h.name != "merge_load"],
            "modules": modules,
        }
        for attempt in range(3):
            reply, told = _run_loader(request)
            failed: dict[str, Any] = reply if "error" in reply else reply.get("packets", {})
            if not failed:
                return ""
            # The loader of an agent that was killed a moment ago may still have been pinning.
            if attempt == 2 or not any("File exists" in line for line in (failed["error"], *told)):
                break
            time.sleep(0.5)
        detail = _telling(told)
        if failed is not reply or "sockets" not in modules:
            self.drop_packets(generation)
            return "\n  ".join([failed["error"], *detail])
        shutil.rmtree(generation.directory, ignore_errors=True)
        kind: type[errors.PointsmanError] = getattr(errors, reply["kind"])
        hint = ""
        if kind is errors.KernelTooOld:
            hint = f" (Pointsman needs Linux 5.18 or newer, this is {platform.release()})"
        raise kind("\n  ".join([reply["error"] + hint, *detail]))

    def drop_packets(self, generation: Generation) -> None:
        """Unpins the programs for packets and their maps. Links that run them go on."""
        for name in _PACKET_PROGRAMS:
            (generation.programs / name).unlink(missing_ok=True)
        specs = self._specs(generation, packets=True)
        for name in specs.keys() - self._specs(generation).keys():
            (generation.maps / name).unlink(missing_ok=True)

    def _point_to(self, generation: Generation) -> None:
        """Makes `current` a generation, in one step."""
        fresh = self.root / "next"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(generation.directory.name)
        fresh.rename(self.root / "current")

    # -- links -------------------------------------------------------------------------------

    def attach(self, generation: Generation, cgroup: Path) -> list[str]:
        """Makes every link run this generation on this cgroup; the hooks that changed.

        On the first attach a failure takes back what was made. Later each link flips atomically
        and in the order of HOOKS; a failure in between leaves a mixture that works, and the next
        start completes it.
        """
        directory = self.root / "links"
        directory.mkdir(exist_ok=True)
        first = not any(directory.iterdir())
        changed: list[str] = []
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for hook in HOOKS:
                program = bpf.obj_get(generation.programs / hook.name)
                try:
                    if _point_link(directory / hook.name, program, target, hook.attach_type):
                        changed.append(hook.name)
                finally:
                    os.close(program)
        except OSError as error:
            if first:
                for name in changed:
                    (directory / name).unlink(missing_ok=True)
            if error.errno == 1 and os.geteuid() == 0:
                raise errors.NoCgroup2(
                    f"{hook.name} on {cgroup}: {error}; another program there may allow none "
                    "beside it ('bpftool cgroup show' says which): detach it, or choose another "
                    "cgroup with --cgroup"
                ) from None
            if error.errno == 1:
                raise errors.NotRoot(f"{error}; run as root") from None
            raise errors.KernelTooOld(f"{hook.name} on {cgroup}: {error}") from None
        finally:
            os.close(target)
        self._point_to(generation)
        return changed

    def drop_others(self, generation: Generation) -> None:
        """Unpins every generation but this one. Its maps stay as long as something uses them."""
        (generation.maps / "previous_load").unlink(missing_ok=True)
        for path in self.root.glob("g_*"):
            if path != generation.directory:
                shutil.rmtree(path, ignore_errors=True)

    def unload(self) -> list[str]:
        """Detaches and unpins everything that is Pointsman's, nothing else; what it removed."""
        removed = [f"links/{name}" for name in DeviceLinks(self.root).remove_all()]
        for hook in reversed(HOOKS):
            # A link that was being replaced when its agent was killed has this other name.
            for name in (hook.name, f"{hook.name}_next"):
                path = self.root / "links" / name
                if path.exists():
                    path.unlink()
                    removed.append(f"links/{name}")
        (self.root / "current").unlink(missing_ok=True)
        (self.root / "next").unlink(missing_ok=True)
        for path in sorted(self.root.glob("g_*")):
            removed.append(path.name)
            shutil.rmtree(path)
        for path in (self.root / "links", self.root):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        return removed


def _run_loader(request: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The loader's reply, and what the compiler and the verifier said."""
    done = subprocess.run(
        [sys.executable, "-m", "pointsman.loader"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        reply = {"kind": "NoCompiler", "error": f"the loader ended with {done.returncode}"}
    return reply, done.stderr.strip().splitlines()


def _telling(lines: list[str], room: int = 12) -> list[str]:
    """The part that says why: a compiler's first error, whose followers it may have caused, or
    the end of the verifier's log."""
    first = next((i for i, line in enumerate(lines) if " error: " in line), None)
    return lines[-room:] if first is None else lines[first : first + room]


def _exists(generation: Generation, name: str) -> bool:
    return (generation.maps / name).exists()


def _pin_again(path: Path, to: Path) -> None:
    fd = bpf.obj_get(path)
    try:
        bpf.obj_pin(fd, to)
    finally:
        os.close(fd)


def _previous_load(path: Path) -> dict[str, int]:
    """Where the counts stand in a `load` that these programs would lay out differently."""
    opened = bpf.Map.open(path, read_only=True)
    info = opened.info
    opened.close()
    fields = btf.members(bpf.btf(info.btf_id), info.btf_value_type_id) if info.btf_id else ()
    offsets = {member.name: member.offset for member in fields}
    if "open" not in offsets:
        raise errors.LayoutMismatch(
            f"{path}: no field 'open' to take the connection counts from; run 'pointsman unload'"
        )
    return {
        "PREVIOUS_LOAD_SIZE": info.value_size,
        "PREVIOUS_LOAD_ENTRIES": info.max_entries,
        "PREVIOUS_LOAD_OPEN": offsets["open"],
    }


def _same_map(one: Path, other: Path) -> bool:
    ids = []
    for path in (one, other):
        if not path.exists():
            return False
        opened = bpf.Map.open(path, read_only=True)
        ids.append(opened.info.id)
        opened.close()
    return ids[0] == ids[1]


def _point_link(path: Path, program: int, cgroup: int, attach_type: int) -> bool:
    """True if something was created or flipped."""
    wanted = os.fstat(cgroup).st_ino
    try:
        link = bpf.obj_get(path)
    except FileNotFoundError:
        link = -1
    try:
        if link >= 0 and bpf.link_cgroup(link) == wanted:
            if bpf.link_program(link) == bpf.program_info(program).id:
                return False
            bpf.link_update(link, program)
            return True
        # No link, or one on another cgroup or on one that is gone: the new one first.
        fresh = bpf.link_create(program, cgroup, attach_type)
        try:
            temporary = path.with_name(f"{path.name}_next")
            temporary.unlink(missing_ok=True)
            bpf.obj_pin(fresh, temporary)
            temporary.rename(path)
        finally:
            os.close(fresh)
        return True
    finally:
        if link >= 0:
            os.close(link)


def differences(spec: abi.MapSpec, path: Path) -> list[str]:
    """Every way in which a pinned map is not what the specification says."""
    opened = bpf.Map.open(path, read_only=True)
    info = opened.info
    opened.close()
    found = [
        f"{spec.name}: {what} {wanted}, pinned map has {actual}"
        for what, wanted, actual in (
            ("type", spec.type, info.type),
            ("key size", spec.key_size, info.key_size),
            ("value size", spec.value_size, info.value_size),
            ("max entries", spec.entries, info.max_entries),
            ("flags", spec.flags, info.flags & ~bpf.BPF_F_RDONLY),
        )
        if wanted != actual
    ]
    if spec.value is None:
        return found
    if not info.btf_value_type_id:
        return [*found, f"{spec.name}: no type information (BTF), so it is not Pointsman's"]
    pinned = btf.members(bpf.btf(info.btf_id), info.btf_value_type_id)
    actual_fields = {member.name: member.offset for member in pinned}
    wanted_fields = {field.name: field.offset for field in spec.value.fields}
    for name in sorted(wanted_fields.keys() | actual_fields.keys()):
        wanted_at, actual_at = wanted_fields.get(name), actual_fields.get(name)
        if wanted_at != actual_at:
            found.append(
                f"{spec.name}: field {name} {_at(wanted_at)}, pinned map has it {_at(actual_at)}"
            )
    return found


def _at(offset: int | None) -> str:
    return "nowhere" if offset is None else f"at byte {offset}"
