"""The book of the map `policies`: what stands there for which owner. Pure.

A policy is whole before a frontend says that there is one, and goes after none says so any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pointsman.plan import Plan
from pointsman.policies import NO_POLICY, PolicyElement
from pointsman.values import Policy


class Policies:
    """`found`: what stands in the map, by owner id."""

    def __init__(self, found: Mapping[int, PolicyElement]) -> None:
        self._held = dict(found)

    def __bool__(self) -> bool:
        return bool(self._held)

    def put(self, owner: int, policy: Policy, sets: Collection[int], plan: Plan) -> None:
        """`sets`: how many endpoints can be drawn of each set of this owner."""
        held = PolicyElement.of_sets(policy, sets)
        before = self._held.get(owner)
        self._held[owner] = held
        if before is None:
            plan.policies.append((owner, held))
            return
        # A set shrinks after less of it may be ejected, and grows before more may.
        first = held._replace(most=min(held.most, before.most))
        if first.words != before.words:
            plan.policies.append((owner, first))
        if first.most != held.most:
            plan.policies_later.append((owner, held))

    def end(self, owner: int, plan: Plan) -> None:
        """This owner has none any more."""
        if self._held.pop(owner, None):
            plan.policies_later.append((owner, NO_POLICY))

    def keep(self, owners: Collection[int], plan: Plan) -> None:
        """What stands there for others than these goes."""
        for owner in [owner for owner in self._held if owner not in owners]:
            self.end(owner, plan)
