"""How likely each endpoint of a set is to get the next connection: choose_slot() of bpf/choose.h,
over all that its draws could be. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from pointsman import weigh
from pointsman.values import Policy
from pointsman.weigh import CHOICE_POLICY, CHOICE_WEIGHTED, CHOICE_ZONE, Member


@dataclass(frozen=True, slots=True)
class Set:
    """All that a choice looks at. `algorithm` is a service's, `now` CLOCK_MONOTONIC in ns, `sticky`
    whether there is session affinity, so that choose_at_once() is not asked."""

    members: Sequence[Member]
    algorithm: int
    policy: Policy | None
    now: int
    sticky: bool = False

    def states(self) -> list[str]:
        """As weigh.state_of() has them."""
        return [weigh.state_of(m, self.algorithm, self.policy, self.now) for m in self.members]

    def costs(self) -> list[float]:
        return [weigh.cost_of(m, self.algorithm, self.policy, self.now) for m in self.members]

    def drawn(self) -> list[float]:
        """How likely each is to be drawn: draw() and next_in_turn()."""
        weights = [0 if m.elsewhere else m.weight for m in self.members]
        total = sum(weights)
        if not self.algorithm & CHOICE_WEIGHTED or not total:
            return [1 / len(self.members)] * len(self.members)
        return [weight / total for weight in weights]


def odds(of: Set, first: Sequence[float] | None = None) -> list[float]:
    """The probability of each member; what is missing to 1 is refused, for all that were asked are
    full or ejected. Of round-robin it is what many connections get. `first` says how likely each is
    looked at first where a table decides."""
    if not of.members:
        return []
    if of.algorithm == weigh.LEAST_CONNECTIONS and not of.sticky:
        chosen, none = _fewer_open(of), 0.0
    elif weigh.is_p2c(of.algorithm):
        chosen, none = _of_two(of, of.drawn(), of.costs())
    else:
        chosen, none = list(first or of.drawn()), 0.0
        if of.algorithm & CHOICE_POLICY and of.policy:
            taken = [state in weigh.TAKEN for state in of.states()]
            none = sum(p for p, may in zip(chosen, taken, strict=True) if not may)
            chosen = [p * may for p, may in zip(chosen, taken, strict=True)]
    spilled = 0.0
    if of.algorithm & CHOICE_ZONE:
        away = [weigh.spills_over(m.open, of.policy) for m in of.members]
        spilled = sum(p * a for p, a in zip(chosen, away, strict=True))
        chosen = [p * (1 - a) for p, a in zip(chosen, away, strict=True)]
        # What the zone can't take goes anywhere.
        spilled, none = spilled + none, 0.0
    if none:
        chosen = [p + none * q for p, q in zip(chosen, _another(of), strict=True)]
    if spilled:
        everywhere = replace(of, algorithm=of.algorithm & ~CHOICE_WEIGHTED)
        chosen = [p + spilled * q for p, q in zip(chosen, _another(everywhere), strict=True)]
    return chosen


def _another(of: Set) -> list[float]:
    """take_another(): some draws, then from the last one on one after the other; where none may be
    taken the last one that is only ejected."""
    drawn, count = of.drawn(), len(of.members)
    states = of.states()
    taken = [state in weigh.TAKEN for state in states]
    spared = [state in (weigh.EJECTED, weigh.TRIAL) for state in states]
    missed = sum(p for p, may in zip(drawn, taken, strict=True) if not may)
    if missed > 1 - 1e-12:
        found = [0.0] * count
    else:
        hit = (1 - missed**weigh.DRAWS) / (1 - missed)
        found = [p * hit * may for p, may in zip(drawn, taken, strict=True)]
    # The last draw was at one that may not be taken.
    left = missed ** (weigh.DRAWS - 1)
    for place in range(count):
        if taken[place] or not drawn[place]:
            continue
        spare = place if spared[place] else None
        for step in range(1, weigh.ASKED - weigh.DRAWS + 1):
            after = (place + step) % count
            if taken[after]:
                found[after] += left * drawn[place]
                break
            if spared[after]:
                spare = after
        else:
            if spare is not None:
                found[spare] += left * drawn[place]
    return found


def _of_two(
    of: Set, first: Sequence[float], costs: Sequence[float], second: Sequence[bool] | None = None
) -> tuple[list[float], float]:
    """The cheaper of two, of equal ones the first: choose_by(). `first` says how likely each is the
    first one; only pairs with one of `second` count. Also how likely both are NEVER."""
    count = len(costs)
    drawn = of.drawn()
    if second is not None:
        drawn = [p * may for p, may in zip(drawn, second, strict=True)]
    apart = not of.algorithm & CHOICE_WEIGHTED  # then the next stands for a second one that is it
    order = sorted(range(count), key=costs.__getitem__)
    ordered = [costs[i] for i in order]
    firsts = [0.0, *accumulate(first[i] for i in order)]
    seconds = [0.0, *accumulate(drawn[i] for i in order)]
    found, none = [0.0] * count, 0.0
    for i, cost in enumerate(costs):
        below, upto = bisect_left(ordered, cost), bisect_right(ordered, cost)
        stays = seconds[-1] - seconds[below]
        comes = drawn[i] * (firsts[-1] - firsts[upto])
        if apart:
            after, before = (i + 1) % count, (i - 1) % count
            stays -= drawn[i]
            if second is None or second[after]:
                stays += (costs[after] >= cost) / count
            if (second is None or second[i]) and costs[before] > cost:
                comes += first[before] / count
        chance = first[i] * stays + comes
        if cost == weigh.NEVER:
            none += chance
        else:
            found[i] = chance
    return found, none


def _fewer_open(of: Set) -> list[float]:
    """fewer_open(): pairs that had no failure of late; instead of any other two are drawn anew."""
    count = len(of.members)
    calm = [not m.outcomes.streak for m in of.members]
    if all(calm):
        return _of_two(of, of.drawn(), of.costs())[0]
    firsts = [may / count for may in calm]
    found, _ = _of_two(of, firsts, of.costs(), calm)
    left = 1 - sum(found)
    again, _ = _of_two(of, of.drawn(), of.costs())
    return [p + left * q for p, q in zip(found, again, strict=True)]
