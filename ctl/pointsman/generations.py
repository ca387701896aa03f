"""One generation of programs and maps: its directories, its maps' sizes, how it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pointsman.hooks import DEVICE_HOOKS, SWEEP
from pointsman.marks import words_for

PACKET_PROGRAMS = tuple(hook.name for hook in (*DEVICE_HOOKS, SWEEP))


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
            "MAX_DESTROYED": 4096,
            "MAX_SKIPPED": 4096,
            "MAX_LINES": self.lines,
            "MAX_SOURCE_RANGES": 16384,
            "MAX_FLOWS": self.flows,
            "MAX_FLOWS_NEW": self.flows_new,
            "MAX_RECENT": 1 << 17,
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
    def former(self) -> Generation:
        """What serves packets if this generation has no programs for that."""
        return Generation(self.directory / "former")

    @property
    def packets(self) -> Generation:
        """Where the programs for packets and all maps that they read are, if there are any."""
        return self if self.has_packets or not self.former.has_packets else self.former

    @property
    def has_packets(self) -> bool:
        return all((self.programs / name).exists() for name in PACKET_PROGRAMS)

    def has(self, name: str) -> bool:
        """Whether that map is pinned here."""
        return (self.maps / name).exists()

    @property
    def name(self) -> str:
        return self.directory.name.removeprefix("g_")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` made or found. `previous`: what runs now, if that is another generation."""

    generation: Generation
    fresh: bool  # whether something of it had to be loaded and pinned
    previous: Generation | None = None
    rebuilt: tuple[str, ...] = ()  # maps that start empty, to be filled before anything flips
    packets: bool = False  # whether there are programs for packets, in generation.packets
    packets_due: bool = False  # they are still to be loaded
    #: Why those of this version could not be loaded; with `packets`, former ones serve instead.
    packets_error: str = ""
    #: Entries of flows as asked for, and as they are, where that could not be changed.
    flows_kept: tuple[int, int] | None = None
    flows_lost: bool = False  # whether open connections stand in another map, of another layout
