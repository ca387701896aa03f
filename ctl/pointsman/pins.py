"""What is pinned where, how it gets there, and how it goes.

    <root>/                       mode 0700, root's
        g_<fingerprint>/          one generation: one source, one set of sizes, one kernel
            programs/<hook>
            maps/<name>           the same maps as before where their layout did not change
            former/               programs/ and maps/ of a version before, which serve packets
                                  where this version's programs for them can't be loaded
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
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pointsman import abi, bpf, errors, loading
from pointsman.attach import DeviceLinks
from pointsman.generations import PACKET_PROGRAMS, Generation, Loaded, Sizes
from pointsman.hooks import DEVICE_HOOKS, FEATURES, HELPERS, HOOKS, DeviceLink, Link
from pointsman.pinned import differences, map_id, pin_again, previous_load, same_map, share
from pointsman.socketlinks import SocketLinks

#: Rebuilt whole in a new generation when one of them changes: they hold each other's numbers.
LOOKUP_MAPS = (
    "frontends",
    "services",
    "slots",
    "shares",
    "names",
    "marks",
    "maglev",
    "source_ranges",
)
#: One new means both new: `policies` counts the endpoints that `load` says are ejected.
COUNTING_MAPS = ("load", "policies")
#: What programs find only if this agent writes it: not in another map of that name.
WRITTEN_MAPS = (*LOOKUP_MAPS, *COUNTING_MAPS, "settings")
#: Describe live sockets: they pass from generation to generation and can't be rebuilt.
RECORD_MAPS = (
    "sockets",
    "sockets_more",
    "sockets_overflow",
    "overflow_netns",
    "datagrams",
    "mptcp",
)
_PACKETS = "HAVE_PACKETS"


@dataclass(slots=True)
class Pins:
    """The pin directory. Methods raise the errors of `pointsman.errors`."""

    root: Path
    sizes: Sizes = field(default_factory=Sizes)
    source_directory: Path = field(default_factory=abi.source_directory)
    #: Ends loading amid a compilation: `load` raises loading.Stopped then.
    stop: threading.Event = field(default_factory=threading.Event)

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
        present = SocketLinks(self.root).present()
        if generation is None:
            return present
        return [
            replace(link, current=link.program == self._program_id(generation, link.hook))
            if link.program is not None
            else link
            for link in present
        ]

    def device_links(self) -> list[DeviceLink]:
        """What is attached to devices of this network namespace, by the names of the pins."""
        generation = self.current
        current: dict[str, int] = {}
        for hook in DEVICE_HOOKS:
            with contextlib.suppress(FileNotFoundError):
                if generation:
                    current[hook.name] = self._program_id(generation.packets, hook.name)
        return [
            replace(link, current=link.program == current.get(link.hook))
            for link in DeviceLinks(self.root).present()
        ]

    @staticmethod
    def _program_id(generation: Generation, hook: str) -> int:
        fd = bpf.obj_get(generation.programs / hook)
        try:
            return bpf.program_info(fd).id
        finally:
            os.close(fd)

    def fingerprint(self) -> str:
        """Names a generation: equal source, sizes and kernel need no loading."""
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

    def load(self, *, packets: bool = False, later: bool = False) -> Loaded:
        """Pins programs and maps of this source and these sizes, compiling if that is needed.
        Changes nothing that runs. Call with the agent's lock held.

        `packets`: those for packets as well. If the kernel or the compiler does not take them,
        sockets are served all the same: `packets_error` says why. Packets then go on being served
        by the programs that do so now, if those understand the maps.

        `later`: where none are yet, sockets need not wait for them. `packets_due` then leaves them
        to `load_packets`: there are no maps of another generation that they would have to take over
        before its pins go.
        """
        self.prepare_root()
        if packets and later and not self._has_packets():
            return replace(self._load(packets=False), packets_due=True)
        kept = self._flows_in_use() if packets else None
        if kept in (None, self.sizes.flows):
            return self._load(packets=packets)
        # Open connections stand in it; what is copied while packets come is behind at once.
        here = replace(self, sizes=replace(self.sizes, flows=kept))
        return replace(here._load(packets=packets), flows_kept=(self.sizes.flows, kept))

    def _flows_in_use(self) -> int | None:
        """How many entries `flows` has, if anything stands there or may at any moment, and this
        version can read it."""
        path = self.current.packets.maps / "flows" if self.current else None
        if path is None or not path.exists():
            return None
        if differences(self._packet_specs()["flows"], path, sizes=False):
            return None
        opened = bpf.Map.open(path, read_only=True)
        try:
            used = next(opened.items(), None) or DeviceLinks(self.root).present()
            return opened.info.max_entries if used else None
        finally:
            opened.close()

    def _load(self, *, packets: bool) -> Loaded:
        generation = Generation(self.root / f"g_{self.fingerprint()}")
        previous = self.current
        if previous == generation:
            previous = None
        fresh = not self._complete(generation)
        if fresh:
            generation.programs.mkdir(parents=True, exist_ok=True)
            generation.maps.mkdir(exist_ok=True)
            self._inherit(generation, previous)
            self._compile_sockets(generation)
        self._check(generation, self._specs(generation))
        rebuilt: tuple[str, ...] = ()
        if previous:
            rebuilt = tuple(
                name
                for name in (*LOOKUP_MAPS, *COUNTING_MAPS)
                if not same_map(previous.maps / name, generation.maps / name)
            )
        elif self.current is None:
            self._point_to(generation)
        loaded = Loaded(generation, fresh, previous, rebuilt)
        return self.load_packets(loaded) if packets else loaded

    def _specs(self, generation: Generation) -> dict[str, abi.MapSpec]:
        features = [f for f in FEATURES[0] if f != "HAVE_MPTCP" or generation.has("mptcp")]
        return abi.map_specs(self.sizes.definitions(), features, self.source_directory)

    def _packet_specs(self) -> dict[str, abi.MapSpec]:
        """The maps that only the programs for packets have."""
        sizes = self.sizes.definitions()
        known = abi.map_specs(sizes, (_PACKETS,), self.source_directory)
        others = abi.map_specs(sizes, (), self.source_directory)
        return {name: spec for name, spec in known.items() if name not in others}

    def _complete(self, generation: Generation) -> bool:
        names = [hook.name for hook in HOOKS] + ["set_generation"]
        if generation.has("previous_load"):
            names.append("merge_load")
        return all((generation.programs / name).exists() for name in names) and all(
            generation.has(name) for name in self._specs(generation)
        )

    def _inherit(self, generation: Generation, previous: Generation | None) -> None:
        """Pins those maps of the running generation again that fit as they are."""
        specs = abi.map_specs(self.sizes.definitions(), FEATURES[0], self.source_directory)
        unlike = self._unlike(generation, previous, specs)
        if previous is None:
            return
        if any(name in unlike for name in COUNTING_MAPS):
            unlike.update((name, ["rebuilt with the others"]) for name in COUNTING_MAPS)
        if any(name in unlike for name in (*LOOKUP_MAPS, *COUNTING_MAPS)):
            unlike.update((name, ["rebuilt with the others"]) for name in LOOKUP_MAPS)
        share(previous, generation, specs.keys() - unlike.keys())
        if "load" in unlike and not generation.has("previous_load"):
            pin_again(previous.maps / "load", generation.maps / "previous_load")

    def _unlike(
        self,
        generation: Generation,
        previous: Generation | None,
        specs: Mapping[str, abi.MapSpec],
    ) -> dict[str, list[str]]:
        """In what those maps of the running generation that do not fit are different."""
        self._check(generation, {n: s for n, s in specs.items() if generation.has(n)})
        if previous is None:
            return {}
        unlike = {
            name: found
            for name, spec in specs.items()
            if previous.has(name) and (found := differences(spec, previous.maps / name))
        }
        refused = [line for name in RECORD_MAPS for line in unlike.get(name, ())]
        if refused:
            raise errors.LayoutMismatch(
                "the records of live sockets have another layout: "
                + "; ".join(refused)
                + "; run 'pointsman unload' first, or stay with the former version and sizes"
            )
        return unlike

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

    def _compile_sockets(self, generation: Generation) -> None:
        try:
            self._compile(generation, loading.SOCKETS)
        except (errors.PointsmanError, loading.Stopped):
            shutil.rmtree(generation.directory, ignore_errors=True)
            raise

    def _compile(self, generation: Generation, module: str) -> None:
        migrating = generation.has("previous_load")
        request = {
            "source": str(self.source_directory),
            "programs": str(generation.programs),
            "maps": str(generation.maps),
            "definitions": {
                **self.sizes.definitions(),
                **(previous_load(generation.maps / "previous_load") if migrating else {}),
            },
            "features": ["HAVE_PREVIOUS_LOAD"] if migrating else [],
            "helpers": [h.name for h in HELPERS if migrating or h.name != "merge_load"],
        }
        loading.load(module, request, self.stop)

    # -- packets -----------------------------------------------------------------------------

    def _has_packets(self) -> bool:
        """Whether programs for packets are pinned, or run."""
        current = self.current
        pinned = current is not None and current.packets.has_packets
        return pinned or bool(DeviceLinks(self.root).present())

    def load_packets(self, loaded: Loaded) -> Loaded:
        """Adds the programs for packets, or those that serve packets now, to what `load` gave. Any
        thread may call it, with the agent's lock held."""
        loaded = replace(loaded, packets_due=False)
        generation, specs = loaded.generation, self._packet_specs()
        before = (loaded.previous or generation).packets
        there = self._packet_pins(generation)
        try:
            if not (generation.has_packets and all(generation.has(name) for name in specs)):
                unlike = self._unlike(generation, before, specs)
                share(before, generation, specs.keys() - unlike.keys())
                self._compile(generation, loading.PACKETS)
                loaded = replace(loaded, fresh=True)
            self._check(generation, specs)
        except (errors.PointsmanError, OSError) as error:
            for path in self._packet_pins(generation) - there:
                path.unlink()
            if not before.has_packets:
                return replace(loaded, packets_error=str(error))
            unfit = self._keep_former(generation, before, specs)
            first, *more = str(error).split("\n")
            if unfit:
                first += f"; the former ones do not fit, for {unfit}"
            return replace(loaded, packets=not unfit, packets_error="\n".join([first, *more]))
        lost = bool(self._read_elsewhere(generation, ("flows",)))
        # Its maps are this generation's, too, and its programs run until devices are flipped.
        self._drop_former(generation)
        return replace(loaded, packets=True, flows_lost=lost)

    def _keep_former(
        self, generation: Generation, before: Generation, specs: Mapping[str, abi.MapSpec]
    ) -> str:
        """Has the programs that serve packets now do so in this generation, too; or says in what
        their maps are not those that this version writes and understands."""
        other = [n for n in WRITTEN_MAPS if not same_map(before.maps / n, generation.maps / n)]
        found = [f"{name} is another map" for name in other]
        for name, spec in specs.items():
            if before.has(name):
                found += differences(spec, before.maps / name, sizes=False)
            else:
                found.append(f"they have no map {name}")
        if found:
            return ", ".join(found)
        former = generation.former
        if before != former:
            shutil.rmtree(former.directory, ignore_errors=True)
            former.programs.mkdir(parents=True)
            former.maps.mkdir()
            share(before, former, {path.name for path in before.maps.iterdir()})
            for name in PACKET_PROGRAMS:
                pin_again(before.programs / name, former.programs / name)
        return ""

    def _packet_pins(self, generation: Generation) -> set[Path]:
        paths = {generation.programs / name for name in PACKET_PROGRAMS}
        paths |= {generation.maps / name for name in self._packet_specs()}
        return {path for path in paths if path.exists()}

    def drop_packets(self, generation: Generation) -> None:
        """Unpins the programs for packets and their maps. Links that run them go on."""
        for path in self._packet_pins(generation):
            path.unlink()
        self._drop_former(generation)

    def outdated(self, generation: Generation) -> list[str]:
        """Of the maps that programs on devices read those that an agent with this generation does
        not write."""
        return self._read_elsewhere(generation, WRITTEN_MAPS)

    def _read_elsewhere(self, generation: Generation, names: Iterable[str]) -> list[str]:
        """Which of these maps programs on devices have, and this generation another of the name."""
        found: set[str] = set()
        today = {name: map_id(generation.maps / name) for name in names}
        for program in {link.program for link in DeviceLinks(self.root).present()}:
            read = bpf.program_maps(program)
            found |= {one.name for one in read if today.get(one.name, one.id) != one.id}
        return sorted(found)

    @staticmethod
    def _drop_former(generation: Generation) -> None:
        shutil.rmtree(generation.former.directory, ignore_errors=True)

    def _point_to(self, generation: Generation) -> None:
        """Makes `current` a generation, in one step."""
        fresh = self.root / "next"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(generation.directory.name)
        fresh.rename(self.root / "current")

    # -- links -------------------------------------------------------------------------------

    def attach(self, generation: Generation, cgroup: Path) -> list[str]:
        """Makes every link run this generation on this cgroup, and `current` be it; the hooks that
        changed."""
        changed = SocketLinks(self.root).attach(generation.programs, cgroup)
        self._point_to(generation)
        return changed

    def hold(self, generation: Generation, cgroup: Path) -> list[str]:
        """Attaches again what has come off since: a cgroup that is removed takes its links along,
        and one that is made anew has none; pins may be deleted. The hooks that changed. Raises
        NotLoaded where the programs are gone, too; OSError, and what `attach` does."""
        links = SocketLinks(self.root)
        if not (generation.programs / HOOKS[0].name).exists():
            raise errors.NotLoaded(
                f"what was pinned under {self.root} is gone; 'pointsman up' loads it again"
            )
        return [] if links.whole(generation.programs, cgroup) else self.attach(generation, cgroup)

    def drop_others(self, generation: Generation) -> None:
        """Unpins every generation but this one. Its maps stay as long as something uses them."""
        (generation.maps / "previous_load").unlink(missing_ok=True)
        for path in self.root.glob("g_*"):
            if path != generation.directory:
                shutil.rmtree(path, ignore_errors=True)

    def unload(self) -> list[str]:
        """Detaches and unpins everything that is Pointsman's, nothing else; what it removed. Raises
        PointsmanError at the end if something of devices has to stay, as its mark then does."""
        removed: list[str] = []
        failed: errors.PointsmanError | None = None
        try:
            removed += [f"links/{name}" for name in DeviceLinks(self.root).remove_all()]
        except errors.PointsmanError as error:
            failed = error
        removed += [f"links/{name}" for name in SocketLinks(self.root).remove_all()]
        (self.root / "current").unlink(missing_ok=True)
        (self.root / "next").unlink(missing_ok=True)
        for path in sorted(self.root.glob("g_*")):
            removed.append(path.name)
            shutil.rmtree(path)
        for path in (self.root / "links", self.root):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if failed:
            raise failed
        return removed
