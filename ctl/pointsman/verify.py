"""Desired against actual: every difference between what should be and what the maps hold. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pointsman.hooks import Link
from pointsman.inspect import (
    PLACES,
    UNKNOWN,
    Held,
    Reader,
    algorithm_name,
    choice_names,
    empty_name,
    flags_text,
    held,
    packets_text,
)
from pointsman.maglev import stamp
from pointsman.plan import RETIRED, Slot
from pointsman.policies import NO_POLICY, PolicyElement, algorithm_of, choices
from pointsman.ranges import Source, source_text
from pointsman.shares import ELSEWHERE, USUAL, normal
from pointsman.values import Backend, Entry, Frontend, Outside, Policy, PortName, endpoint_text

_NOT_SERVED = Outside()


@dataclass(frozen=True, slots=True)
class Difference:
    """`kind` is one word for scripts, `object` what differs, `message` how."""

    kind: str
    object: str
    message: str


def compare(desired: Iterable[Entry], reader: Reader) -> list[Difference]:
    """Every difference between the entries and the maps, sorted by object."""
    wanted: dict[Frontend, list[Entry]] = {}
    for entry in desired:
        wanted.setdefault(entry.frontend, []).append(entry)
    actual = {each.frontend: each for each in held(reader)}
    ranges = reader.ranges()
    found: list[Difference] = []
    for frontend, entries in wanted.items():
        if frontend not in actual:
            message = f"missing, {entries[0].owner} defines it"
            found.append(Difference("frontend-missing", str(frontend), message))
            continue
        if not reader.marked(frontend.address):
            message = "its address is not marked, so no program looks for it"
            found.append(Difference("mark-missing", str(frontend), message))
        each = actual[frontend]
        # Two Services may define one frontend: whoever has it, has it rightly.
        entry = next((e for e in entries if e.owner == each.name), entries[0])
        found += _compare(entry, each)
        found += _compare_outside(entry.outside or _NOT_SERVED, each, ranges.get(each.ident, ()))
    for frontend, each in actual.items():
        if frontend not in wanted:
            message = f"extra, held for {_name(each)}; nothing defines it"
            found.append(Difference("frontend-extra", str(frontend), message))
        found += _sound(each, reader)
    policies = {e.owner: e.policy for entries in wanted.values() for e in entries if e.policy}
    found += _compare_policies(policies, actual.values(), reader)
    found += _dangling(list(actual.values()), reader)
    return sorted(set(found), key=lambda d: (d.object, d.kind, d.message))


def _name(each: Held) -> str:
    return str(each.name) if each.name != UNKNOWN else f"owner {each.element.owner} without a name"


def _compare(entry: Entry, each: Held) -> list[Difference]:
    found: list[Difference] = []
    at, element = str(entry.frontend), each.element
    for kind, want, have in (
        ("owner", str(entry.owner), _name(each)),
        ("algorithm", _algorithm(algorithm_of(entry)), _algorithm(element.algorithm)),
        ("affinity", f"{entry.affinity} s", f"{element.affinity} s"),
        ("flags", flags_text(entry.flags), flags_text(element.flags)),
    ):
        if want != have:
            found.append(Difference(kind, at, f"{kind} should be {want}, is {have}"))
    if not entry.endpoints and not element.count and entry.empty != element.first:
        want, have = empty_name(entry.empty), empty_name(element.first)
        found.append(Difference("empty", at, f"an empty set should mean {want}, means {have}"))
    return found + _compare_sets(at, entry.endpoints, entry.places, entry.weights, each.slots)


def _algorithm(number: int) -> str:
    return " ".join((algorithm_name(number), *choice_names(number)))


def _compare_sets(
    at: str,
    endpoints: Sequence[Backend],
    places: Sequence[int],
    weights: Sequence[int],
    slots: Sequence[Slot],
    where: str = "",
) -> list[Difference]:
    """`where` is " from outside" for what clients outside get."""
    found: list[Difference] = []
    kinds = "outside-endpoint" if where else "endpoint"
    want_set, have_set = Counter(endpoints), Counter(slot.backend for slot in slots)
    for kind, verb, backends in (
        (f"{kinds}-missing", "lacks", want_set - have_set),
        (f"{kinds}-extra", "has, but should not,", have_set - want_set),
    ):
        found += [Difference(kind, at, f"{verb} {_text(b)}{where}") for b in sorted(backends)]
    known = dict(zip(endpoints, places, strict=False))
    for slot in slots:
        want, have = known.get(slot.backend, 0), slot.place
        if slot.backend in want_set and want != have:
            message = f"{_text(slot.backend)} should be {_place(want)}, is {_place(have)}{where}"
            found.append(Difference("place", at, message))
    weigh = dict(zip(endpoints, normal(weights), strict=False))
    alike = not normal([slot.weight for slot in slots])
    for slot in slots:
        want, have = weigh.get(slot.backend, USUAL), USUAL if alike else slot.weight
        if slot.backend in want_set and want != have:
            texts = _weight(want), _weight(have)
            message = f"{_text(slot.backend)} should {texts[0]}, does {texts[1]}{where}"
            found.append(Difference("weight", at, message))
    return found


def _compare_policies(
    wanted: Mapping[PortName, Policy], actual: Iterable[Held], reader: Reader
) -> list[Difference]:
    sets: dict[tuple[PortName, int], list[int]] = {}
    for each in actual:
        weights = [slot.weight for slot in each.slots]
        backends = [slot.backend for slot in each.slots]
        sets.setdefault((each.name, each.element.owner), []).append(choices(backends, weights))
    there, found = dict(reader.policies()), []
    for (name, owner), sizes in sets.items():
        want, have = NO_POLICY, there.pop(owner, NO_POLICY)
        if policy := wanted.get(name):
            want = PolicyElement.of_sets(policy, sizes)
        if want.words != have.words:
            message = f"policy should be {want}, is {have}"
            found.append(Difference("policy", str(name), message))
    for owner in there:
        message = f"owner {owner} has a policy, but no frontend belongs to it"
        found.append(Difference("policy-dangling", f"owner {owner}", message))
    return found


def _compare_outside(wanted: Outside, each: Held, ranges: Collection[Source]) -> list[Difference]:
    at, element = str(each.frontend), each.element
    found = _compare_sets(
        at, wanted.endpoints, wanted.places, wanted.weights, each.outside, " from outside"
    )
    want, have = (packets_text(flags) for flags in (wanted.flags, element.packets))
    if want != have:
        found.append(Difference("packets", at, f"packets should be {want}, are {have}"))
    elif (
        not wanted.endpoints and not element.outside.count and wanted.empty != element.outside.first
    ):
        want, have = empty_name(wanted.empty), empty_name(element.outside.first)
        message = f"an empty set should mean {want} from outside, means {have}"
        found.append(Difference("outside-empty", at, message))
    for kind, verb, sources in (
        ("range-missing", "lacks", set(wanted.sources) - set(ranges)),
        ("range-extra", "has, but should not,", set(ranges) - set(wanted.sources)),
    ):
        found += [
            Difference(kind, at, f"{verb} source range {source_text(source)}")
            for source in sorted(sources)
        ]
    return found


def _stamp(slots: Sequence[Slot]) -> bytes:
    return stamp([slot.backend for slot in slots], normal([slot.weight for slot in slots]))


def _weight(weight: int) -> str:
    where = " in another zone" if weight & ELSEWHERE else ""
    return f"weigh {weight & (ELSEWHERE - 1)}{where}"


def _place(place: int) -> str:
    return PLACES.get(place, "anywhere")


def _text(backend: Backend) -> str:
    return f"endpoint {endpoint_text(*backend)}"


def _sound(each: Held, reader: Reader) -> list[Difference]:
    """What must hold whatever the desired state is."""
    found: list[Difference] = []
    at, element = str(each.frontend), each.element
    if element.frontend != each.frontend:
        message = f"service {each.ident} has the key {element.frontend}, so nothing is translated"
        found.append(Difference("key", at, message))
    if each.name == UNKNOWN:
        message = f"owner {element.owner} of service {each.ident} has no name"
        found.append(Difference("name-missing", at, message))
    if len(each.slots) != element.count:
        message = f"the set of service {each.ident} ends beyond the slots map"
        found.append(Difference("set", at, message))
    if len(each.outside) != element.outside.count:
        message = f"the outside set of service {each.ident} ends beyond the slots map"
        found.append(Difference("set", at, message))
    elif element.table.count and reader.stamp(element.table) != _stamp(each.outside):
        message = f"the Maglev table of service {each.ident} was made for other endpoints"
        found.append(Difference("table", at, message))
    inside = element.inside if len(each.slots) == element.count else None
    if inside and inside.count and reader.stamp(inside) != _stamp(each.slots):
        message = f"the Maglev table for sockets of service {each.ident} was made for others"
        found.append(Difference("table", at, message))
    for slot in {*each.slots, *each.outside}:
        generation, _ = reader.load(slot.endpoint)
        if generation != slot.generation:
            state = " (retired)" if generation & RETIRED else ""
            message = (
                f"{_text(slot.backend)} has generation {slot.generation}, load of endpoint "
                f"{slot.endpoint} has {generation & ~RETIRED}{state}: it is not counted"
            )
            found.append(Difference("generation", at, message))
        if slot.owner != element.owner:
            message = f"{_text(slot.backend)} belongs to owner {slot.owner}, not {element.owner}"
            found.append(Difference("slot-owner", at, message))
    return found


def _dangling(actual: Sequence[Held], reader: Reader) -> list[Difference]:
    """What no frontend leads to: it should have been given back."""
    owners = {each.element.owner for each in actual}
    idents = {each.ident for each in actual}
    found = [
        Difference("name-dangling", str(name), f"name {ident} is there, but no frontend has it")
        for ident, name in reader.names().items()
        if ident not in owners
    ]
    for ident in reader.owned():
        if ident not in idents:
            frontend = str(reader.service(ident).frontend)
            message = f"service {ident} is in use, but no frontend leads to it"
            found.append(Difference("service-dangling", frontend, message))
    return found


def link_differences(links: Sequence[Link]) -> list[Difference]:
    """Hooks that do not run the current programs, or not where the others do."""
    found: list[Difference] = []
    usual = Counter(link.cgroup for link in links if link.program is not None).most_common(1)
    for link in links:
        if link.program is None:
            message = "not attached"
        elif not link.current:
            message = f"runs program {link.program}, which is not the current generation's"
        elif not link.cgroup:
            message = "its cgroup is gone"
        elif link.cgroup != usual[0][0]:
            message = f"is attached to cgroup {link.cgroup}, others to {usual[0][0]}"
        else:
            continue
        found.append(Difference("link", link.hook, message))
    return found
