"""Real maps that tell of every write, and can fail in between, as the strict fake does."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from pointsman.maps import Maps
from pointsman.plan import Snapshot
from pointsman.values import Backend, Frontend


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
        if not element.count:
            return (), element.first
        slots = self._maps.slots(element.first, element.count)
        for slot in slots:
            assert self._maps.load(slot.endpoint)[0] == slot.generation, "a retired endpoint"
        return tuple(slot.backend for slot in slots), 0

    def state(self) -> dict[Frontend, tuple[tuple[Backend, ...], int]]:
        found = {frontend: self.resolve(frontend) for frontend in self._maps.frontends()}
        return {frontend: value for frontend, value in found.items() if value is not None}

    @property
    def frontends(self) -> dict[Frontend, int]:
        return self._maps.frontends()
