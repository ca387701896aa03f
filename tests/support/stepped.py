"""Real maps that tell of every write, and can fail in between, as the strict fake does."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

from pointsman import abi, maglev
from pointsman.maps import Maps
from pointsman.plan import Element, Run, Snapshot
from pointsman.policies import PolicyElement
from pointsman.ranges import pack
from pointsman.values import Address, Backend, Frontend
from tests.support.choice import share_of, weights_in_effect

_OUTSIDE, _RANGES = (abi.constants()[f"PACKETS_{name}"] for name in ("OUTSIDE", "RANGES"))
_POLICY = abi.constants()["CHOICE_POLICY"]
_u32 = struct.Struct("=I").pack


class SteppedMaps:
    """Delegates to `Maps`; lists are written one element at a time."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self.limits = maps.limits
        self.on_step: Callable[[], None] = lambda: None
        self.fail_after: int | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        write = getattr(self._maps, name)

        def step(*arguments: Any) -> None:
            if len(arguments) == 1 and isinstance(arguments[0], list | bytes):
                for item in arguments[0]:
                    self._step(write, [item])
            else:
                self._step(write, *arguments)

        return step

    def _step(self, write: Callable[..., None], *arguments: Any) -> None:
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise OSError(errno.ENOMEM, "injected")
            self.fail_after -= 1
        write(*arguments)
        self.on_step()

    def wait_for_readers(self) -> None:
        self._maps.wait_for_readers()

    def snapshot(self) -> Snapshot:
        return self._maps.snapshot()

    def resolve(self, frontend: Frontend) -> tuple[tuple[Backend, ...], int] | None:
        """What bpf/lookup.h would find now."""
        service = self._maps.find(frontend)
        if service is None:
            return None
        element = self._maps.service(service)
        if element.frontend != frontend:
            return None
        return self._members(Run(element.first, element.count))

    def weights(self, frontend: Frontend) -> tuple[int, ...]:
        """What draw() of bpf/choose.h goes by: () if all are alike."""
        element = self._element(frontend)
        shares = self._maps.map("shares")
        found = (shares.lookup(_u32(element.first + i)) or b"" for i in range(element.count))
        return weights_in_effect(element.algorithm, [share_of(data) for data in found])

    def policy(self, frontend: Frontend) -> PolicyElement | None:
        element = self._element(frontend)
        if not element.algorithm & _POLICY:
            return None
        data = self._maps.map("policies").lookup(_u32(element.owner)) or b""
        return PolicyElement.of(data)

    def algorithm(self, frontend: Frontend) -> int:
        return self._element(frontend).algorithm

    def _element(self, frontend: Frontend) -> Element:
        service = self._maps.find(frontend)
        assert service is not None
        return self._maps.service(service)

    def _members(self, run: Run) -> tuple[tuple[Backend, ...], int]:
        if not run.count:
            return (), run.first
        slots = self._maps.slots(*run)
        for slot in slots:
            assert self._maps.load(slot.endpoint)[0] == slot.generation, "a retired endpoint"
        return tuple(slot.backend for slot in slots), 0

    def resolve_outside(
        self, frontend: Frontend, client: Address
    ) -> tuple[tuple[Backend, ...], int] | str | None:
        """What bpf/select.h would find now for a client outside."""
        service = self._maps.find(frontend)
        if service is None:
            return None
        element = self._maps.service(service)
        if element.frontend != frontend or not element.packets & _OUTSIDE:
            return None
        if element.packets & _RANGES:
            found = self._maps.map("source_ranges").lookup(pack(service, (client, 128)))
            if found is None:
                return "barred"
        return self._members(element.outside)

    def table(self, frontend: Frontend) -> tuple[int, ...]:
        """The entries of its Maglev table; () if it has none."""
        return self._entries(self._element(frontend).table)

    def inside(self, frontend: Frontend) -> tuple[int, ...]:
        """The same of the one for sockets."""
        return self._entries(self._element(frontend).inside)

    def _entries(self, run: Run) -> tuple[int, ...]:
        lines = range(run.first, run.first + maglev.lines_of(run.count))
        opened = self._maps.map("maglev")
        data = b"".join(opened.lookup(_u32(line)) or b"" for line in lines)
        return tuple(memoryview(data).cast("H")[: run.count])

    def state(self) -> dict[Frontend, tuple[tuple[Backend, ...], int]]:
        found = {frontend: self.resolve(frontend) for frontend in self._maps.frontends()}
        return {frontend: value for frontend, value in found.items() if value is not None}

    @property
    def frontends(self) -> dict[Frontend, int]:
        return self._maps.frontends()
