"""A world brought into a namespace of the API server, by the differences to what was there."""

from __future__ import annotations

import copy
from typing import Any

from tests.cluster.api import ApiError
from tests.cluster.cluster import Cluster
from tests.cluster.compare.world import World
from tests.cluster.space import Space

Object = dict[str, Any]
_DISCOVERY = "discovery.k8s.io/v1"


class Applied:
    """What of a world is in force. `made_anew` counts Services that could not be changed."""

    def __init__(self, cluster: Cluster, space: Space) -> None:
        self._cluster = cluster
        self._space = space
        self._services: dict[str, Object] = {}
        self._slices: dict[str, Object] = {}
        self._statuses: dict[str, Object] = {}
        self._zones: dict[str, str | None] = {}
        self.made_anew = 0

    def bring(self, world: World) -> None:
        for node, zone in world.zones.items():
            if self._zones.get(node, "") != zone:
                self._cluster.nodes[node].label(topology_kubernetes_io__zone=zone)
        for name in self._services.keys() - world.services.keys():
            self._space.delete("Service", name)
        for name in self._slices.keys() - world.slices.keys():
            self._space.delete("EndpointSlice", name, _DISCOVERY)
        for name, service in world.services.items():
            if self._services.get(name) != service:
                self._statuses.pop(name, None)
                self._service(name, service)
            status = world.statuses.get(name)
            if status and self._statuses.get(name) != status:
                self._space.api.patch_status(
                    "Service", name, status, namespace=self._space.namespace
                )
        for name, piece in world.slices.items():
            if self._slices.get(name) != piece:
                self._slice(name, piece)
        self._services = copy.deepcopy(world.services)
        self._slices = copy.deepcopy(world.slices)
        self._statuses = copy.deepcopy(world.statuses)
        self._zones = dict(world.zones)

    def _service(self, name: str, service: Object) -> None:
        try:
            self._space.apply(service)
        except ApiError as error:
            if error.status != 422 or name not in self._services:
                raise
            self.made_anew += 1
            self._space.delete("Service", name)
            self._space.apply(service)

    def _slice(self, name: str, piece: Object) -> None:
        """The type of its addresses can't be changed."""
        known = self._slices.get(name)
        if known and known["addressType"] != piece["addressType"]:
            self._space.delete("EndpointSlice", name, _DISCOVERY)
        self._space.apply(piece)
