"""Which endpoint of a set a socket gets, and what the choice weighs: bpf/choose.h in words.
Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pointsman import maglev, weigh
from pointsman.endpointrows import Ejection, ejection, policy_of, state_text
from pointsman.inspect import Reader
from pointsman.odds import Set, odds
from pointsman.plan import Element, Slot
from pointsman.values import endpoint_text

_NONE = 1e-9
_PASSED_OVER = (weigh.FULL, weigh.EJECTED, weigh.TRIAL)
_COMPARED = {
    weigh.LEAST_CONNECTIONS: "fewer open connections",
    weigh.PEAK_EWMA: "less connect time × open connections",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One endpoint that a connection may get. `current`: its connections are counted.

    `cost` is what least-connections and peak-ewma compare, None where nothing is compared or the
    endpoint is passed over. `weight`, `connect_microseconds`, `state` and `ejection` as in
    EndpointRow. `spill` is the share of its connections that go on to any zone.
    """

    endpoint: str
    id: int
    generation: int
    load_generation: int
    current: bool
    open: int
    probability: float
    weight: int | None
    cost: int | None
    connect_microseconds: int | None
    failures_in_a_row: int
    state: str
    spill: float
    ejection: Ejection | None


@dataclass(frozen=True, slots=True)
class Choice:
    """`steps` are those before the endpoints are looked at; `refused` is the probability that none
    of them may be taken."""

    candidates: tuple[Candidate, ...]
    steps: tuple[str, ...]
    refused: float

    @property
    def nobody(self) -> bool:
        """Whether none may be taken."""
        return self.refused > 1 - _NONE

    @property
    def sure(self) -> str:
        """The endpoint that nothing else can happen to, "" if there are several."""
        found = [c.endpoint for c in self.candidates if c.probability]
        return found[0] if len(found) == 1 and not self.refused else ""


def choice(
    reader: Reader, element: Element, slots: Sequence[Slot], client: int, kept: str, now: int
) -> Choice:
    """`client` is the cookie of the network namespace that connects, 0 if it may be any. `kept`:
    the endpoint that the client has already, "" if it is to choose. `now` is CLOCK_MONOTONIC in ns.
    """
    algorithm = element.algorithm
    policy = policy_of(element, reader.policies())
    # cost_of() does not ask whose generation the numbers are.
    members = [
        weigh.Member(reader.load(s.endpoint)[1], reader.outcomes(s.endpoint), s.weighs, s.elsewhere)
        for s in slots
    ]
    found = Set(members, algorithm, policy, now, bool(element.affinity))
    first: Sequence[float] | None = None
    steps: tuple[str, ...] = ()
    if algorithm & weigh.ALGORITHM_MASK == weigh.MAGLEV and slots:
        first, steps = _by_table(reader, element, found.drawn(), slots, client)
    chances = odds(found, first)
    refused = 1 - sum(chances)
    if kept:
        chances = [float(endpoint_text(*slot.backend) == kept) for slot in slots]
    share = len(slots) / element.count
    candidates = []
    for slot, member, chance, cost, state in zip(
        slots, members, chances, found.costs(), found.states(), strict=True
    ):
        known, generation = member.outcomes, reader.load(slot.endpoint)[0]
        compared = weigh.is_p2c(algorithm) and cost != weigh.NEVER
        zone = algorithm & weigh.CHOICE_ZONE and slot.weighs and not slot.elsewhere
        candidates.append(
            Candidate(
                endpoint=endpoint_text(*slot.backend),
                id=slot.endpoint,
                generation=slot.generation,
                load_generation=generation,
                current=generation == slot.generation,
                open=member.open,
                probability=round(chance * share, 6),
                weight=slot.weighs if algorithm & weigh.CHOICE_WEIGHTED else None,
                cost=int(cost) if compared else None,
                connect_microseconds=weigh.connect_time(known, now) or None,
                failures_in_a_row=known.streak,
                state=state,
                spill=round(weigh.spills_over(member.open, policy), 6) if zone else 0.0,
                ejection=ejection(known, algorithm, policy, now),
            )
        )
    return Choice(tuple(candidates), steps, 0.0 if kept or refused < _NONE else refused)


def _by_table(
    reader: Reader, element: Element, drawn: Sequence[float], slots: Sequence[Slot], client: int
) -> tuple[Sequence[float], tuple[str, ...]]:
    """by_table(): how likely each place is, of this client or of all."""
    (first, entries), count = element.inside, len(slots)
    number = maglev.socket_hash(client, element.owner)
    if not client:
        if not entries:
            return drawn, ()
        lines = range(first, first + -(-entries // maglev.PER_LINE))
        places = Counter([place for line in lines for place in reader.line(line)][:entries])
        return [places[place] / entries for place in range(count)], ()
    step = f"Maglev: hash {number:#010x} of this client"
    place = count
    if entries:
        entry = number * entries >> 32
        place = reader.line(first + entry // maglev.PER_LINE)[entry % maglev.PER_LINE]
        step += f", entry {entry} of {entries} has place {place}"
    if place >= count:
        place = maglev.hit([slot.weight for slot in slots], number)
        step += f", which chooses place {place} without a table"
    return [float(each == place) for each in range(count)], (step,)


def candidate_step(candidate: Candidate, index: int) -> str:
    """What stands in one slot, and what a choice makes of it."""
    known = (
        f"generation {candidate.generation} as in load"
        if candidate.current
        else f"generation {candidate.generation}, but load has {candidate.load_generation}: "
        "its connections are not counted"
    )
    more = [
        *(() if candidate.weight is None else (f"weight {candidate.weight}",)),
        *(() if candidate.cost is None else (f"cost {candidate.cost}",)),
    ]
    if candidate.cost is not None and candidate.connect_microseconds:
        more.append(f"connect time {candidate.connect_microseconds} µs")
    if candidate.failures_in_a_row:
        more.append(f"{_plural(candidate.failures_in_a_row, 'failure')} in a row")
    if candidate.spill:
        more.append(f"{candidate.spill:.1%} of its connections go on to any zone")
    if candidate.state == weigh.TRIAL_DUE:
        more.append(f"the next connection tries it ({state_text(candidate.state, None)})")
    elif candidate.state != weigh.READY or candidate.ejection:
        verb = "passed over: " if candidate.state in _PASSED_OVER else ""
        more.append(verb + state_text(candidate.state, candidate.ejection))
    extra = "".join(f", {text}" for text in more)
    return (
        f"slot {index}: {candidate.endpoint}, probability {candidate.probability:.1%}, "
        f"{candidate.open} open{extra}, endpoint {candidate.id}, {known}"
    )


def outcome(found: Choice, algorithm: int, who: str, errno: str) -> str:
    """What a connection gets, in a sentence; `who` is "a connection" or "a socket", `errno` what
    it fails with if it gets none."""
    count = len(found.candidates)
    if found.nobody:
        states = Counter(c.state for c in found.candidates)
        reasons = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        return f"{errno}: no endpoint may be taken ({reasons})"
    result = f"{who} gets {_what(found, algorithm, count)}"
    if found.refused:
        result += f"; {found.refused:.1%} fail with {errno}: of the {weigh.ASKED} endpoints "
        result += "that are asked at most none may be taken"
    return result


def _what(found: Choice, algorithm: int, count: int) -> str:
    if count == 1:
        return "the one endpoint"
    if found.sure:
        return f"{found.sure}, of {count} endpoints"
    by = algorithm & weigh.ALGORITHM_MASK
    weights = " by their weights" if algorithm & weigh.CHOICE_WEIGHTED else ""
    if less := _COMPARED.get(by):
        return f"of two by chance{weights} of {count} endpoints the one with {less}"
    if by == weigh.ROUND_ROBIN:
        return f"the next of {count} endpoints in turn{weights}"
    if by == weigh.MAGLEV:
        return f"one of {count} endpoints by its network namespace"
    return f"one of {count} endpoints at random{weights}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
