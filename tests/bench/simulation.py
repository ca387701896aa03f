"""The rules of choice with many nodes, each of which sees only its own connections. Simulated.

Discrete events, seeded: the same requests go by each algorithm. A request is one connection from
its connect to its answer. Requests come when they come (open loop, Poisson) from clients of equal
rate, spread over the nodes. An endpoint works on a few at once, the others queue; who has waited
for DEADLINE goes. After WARM one endpoint of ten turns bad, and only from
then on things are counted: what it takes to find out is part of the figures.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush, heapreplace
from itertools import count
from pathlib import Path
from random import Random

from pointsman import maglev
from pointsman.values import Backend
from tests.bench import choices
from tests.bench.choices import SECOND, Load, Node, Policy

SEED = 7
WORKERS = 4  # requests that an endpoint works on at once
SERVICE = 0.3  # seconds of work, in the mean
ROUND_TRIP = 0.001  # seconds, with a spread
DEADLINE = 5 * SECOND
WARM = 2 * SECOND
BAD = 10  # one of so many
UTILISATIONS = (0.5, 0.7, 0.9)
USUAL = 0.7
#: Where plots go (--plots); None: nowhere.
PLOTS: Path | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What is wrong with one endpoint of ten: its factors to work and round trip. `spread` is sigma
    of the logarithm of the work, `seconds` how long is measured."""

    title: str
    slower: float = 1
    farther: float = 1
    refuses: bool = False
    spread: float = 0.5
    seconds: int = 10


CASES = {
    "equal": Case("all endpoints equal"),
    "slow": Case("one of ten is ten times slower", slower=10),
    "tail": Case("a heavy tail of work", spread=1.2),
    "far": Case("one of ten is far (100 ms)", farther=100),
    "refusing": Case("one of ten refuses", refuses=True, seconds=30),
}


@dataclass(frozen=True, slots=True)
class How:
    """How endpoints are chosen. `apart`: each node begins its rounds elsewhere. `subset`: so many
    endpoints for each node, 0 = all. `eager`: ejects after one failure, for a minute at least."""

    name: str
    algorithm: int
    ejection: bool = False
    apart: bool = False
    subset: int = 0
    eager: bool = False

    @property
    def sees(self) -> bool:
        """Whether what a node knows has a say."""
        return self.ejection or self.algorithm in (choices.LEAST_CONNECTIONS, choices.PEAK_EWMA)

    @property
    def is_local(self) -> bool:
        """Whether the number of nodes makes a difference."""
        return self.sees or bool(self.subset) or self.algorithm == choices.ROUND_ROBIN


RANDOM = How("random", choices.RANDOM)
ROUND_ROBIN = How("round-robin, in step", choices.ROUND_ROBIN)
LEAST = How("least-connections", choices.LEAST_CONNECTIONS)
EWMA = How("peak-ewma", choices.PEAK_EWMA)
MAGLEV = How("maglev", choices.MAGLEV)
APART = How("round-robin, apart", choices.ROUND_ROBIN, apart=True)
ALGORITHMS = (RANDOM, ROUND_ROBIN, APART, LEAST, EWMA, MAGLEV)
EJECTING = tuple(
    How(f"{how.name}, ejection", how.algorithm, ejection=True) for how in (RANDOM, LEAST, EWMA)
)
SUBSETS = (10, 30, 100)


@dataclass(frozen=True, slots=True)
class Requests:
    """In order of time: when (ns), which client, how much work (ns on a good endpoint)."""

    at: list[int]
    clients: list[int]
    work: list[int]


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds of those that were not refused, shares, and max ÷ mean of the endpoints' load
    (what each got by what it can do; those that refuse are left out)."""

    p50: float
    p99: float
    p999: float
    failed: float
    fairness: float


def spread_around(random: Random, mean: float, sigma: float) -> list[int]:
    """64 Ki numbers of a log-normal distribution, cut at 15 times the mean; ns from seconds."""
    return [
        int(SECOND * mean * min(15, random.lognormvariate(-sigma * sigma / 2, sigma)))
        for _ in range(1 << 16)
    ]


def requests(case: Case, utilisation: float, size: int, skew: float = 0) -> Requests:
    """For `size` clients and endpoints, at this share of what the endpoints can do in sum. With
    `skew` a client's rate is as 1 ÷ its number to that power; neighbours share a node."""
    random = Random(SEED)
    bad = size // BAD
    able = size - bad + (0 if case.refuses else bad / case.slower)
    rate = utilisation * able * WORKERS / SERVICE
    work, at, now, end = spread_around(random, SERVICE, case.spread), [], 0.0, case.seconds
    while now < end + WARM / SECOND:
        at.append(int(now * SECOND))
        now += random.expovariate(rate)
    if skew:
        weights = [(1 + client) ** -skew for client in range(size)]
        clients = random.choices(range(size), weights, k=len(at))
    else:
        clients = [int(random.random() * size) for _ in at]
    return Requests(at, clients, random.choices(work, k=len(at)))


def subsets(size: int, nodes: int, each: int) -> Iterator[Sequence[int]]:
    """The endpoints of one node after the other: shuffled anew whenever all have been dealt, so
    that each is dealt as often as any other."""
    random, dealt = Random(SEED), list[int]()
    for _ in range(nodes):
        if len(dealt) < each:
            dealt = random.sample(range(size), size)
        yield dealt[:each]
        dealt = dealt[each:]


def make_policy(how: How, endpoints: int) -> Policy | None:
    if not how.ejection:
        return None
    policy = Policy(most=max(1, int(0.3 * endpoints)))
    if how.eager:
        policy.streak, policy.shortest = 1, 60 * SECOND
    return policy


def make_nodes(how: How, number: int, size: int, random: Random) -> list[Node]:
    each = min(how.subset or size, size)
    sets = subsets(size, number, each) if how.subset else iter([range(size)] * number)
    table: array[int] | None = None
    if how.algorithm == choices.MAGLEV:
        backends: list[Backend] = [(i.to_bytes(16, "big"), 80) for i in range(size)]
        table = maglev.table(backends, None, maglev.size_for(size))
    return [
        Node(
            how.algorithm,
            endpoints,
            random.random,
            make_policy(how, each),
            table,
            int(random.random() * each) if how.apart else 0,
        )
        for endpoints in sets
    ]


OPEN, REFUSED, CLOSED = range(3)
#: (when, in which order, what, endpoint at the node, the node's policy, connect time in µs)
Event = tuple[int, int, int, Load, Policy | None, int]


def settle(events: list[Event], until: int) -> None:
    """What nodes see of their connections up to a time."""
    while events and events[0][0] <= until:
        now, _, what, load, policy, latency = heappop(events)
        if what == CLOSED:
            load.open -= 1
        elif what == OPEN:
            choices.succeeded(load, policy, latency, now)
        else:
            load.open -= 1
            choices.failed(load, policy, now)


def simulate(case: Case, asked: Requests, how: How, number: int, size: int) -> Result:
    """All requests, with the clients on so many nodes."""
    random = Random(SEED)
    nodes = make_nodes(how, number, size, random)
    trips = spread_around(random, ROUND_TRIP, 0.5)
    turns_bad = set(random.sample(range(size), size // BAD))
    free = [[0] * WORKERS for _ in range(size)]  # of each endpoint: when each worker will be
    events: list[Event] = []
    order = count()
    waited, received, failures, all_asked = list[int](), [0] * size, 0, 0
    for at, client, work in zip(asked.at, asked.clients, asked.work, strict=True):
        settle(events, at)
        node = nodes[client * number // size]
        place = choices.choose_slot(node, client, at)
        assert place is not None  # nobody is ever full without a cap
        endpoint = node.endpoints[place]
        trip = trips[int(random.random() * len(trips))]
        counts, refused = at >= WARM, False
        if counts:
            all_asked += 1
            received[endpoint] += 1
            if endpoint in turns_bad:
                work, trip = int(work * case.slower), int(trip * case.farther)
                refused = case.refuses
        if refused:
            failures += 1
        else:
            workers, gone = free[endpoint], at + DEADLINE
            begins = max(at + trip + trip // 2, workers[0])
            done = gone
            if begins < gone:  # else nobody waits for it any more
                heapreplace(workers, begins + work)
                done = min(gone, begins + work + trip // 2)
            if counts:
                waited.append(done - at)
                failures += done == gone
        if how.sees:
            load = node.load_of(place)
            load.open += 1
            us = trip // 1000
            what = REFUSED if refused else OPEN
            heappush(events, (at + trip, next(order), what, load, node.policy, us))
            if not refused:
                heappush(events, (done, next(order), CLOSED, load, None, 0))
    waited.sort()
    p50, p99, p999 = (waited[int(len(waited) * q)] / 1e6 for q in (0.5, 0.99, 0.999))
    loads = [
        got * (case.slower if i in turns_bad else 1)
        for i, got in enumerate(received)
        if not (case.refuses and i in turns_bad)
    ]
    return Result(p50, p99, p999, failures / all_asked, max(loads) * len(loads) / sum(loads))


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Without `nodes`: they make no difference."""

    case: str
    utilisation: float
    how: str
    nodes: int | None
    result: Result

    def __str__(self) -> str:
        r, nodes = self.result, "any" if self.nodes is None else f"{self.nodes:,}"
        return (
            f"| {self.case} | {self.utilisation:.0%} | {self.how} | {nodes} "
            f"| {r.p50:.0f} | {r.p99:.0f} | {r.p999:.0f} | {r.failed:.3%} | {r.fairness:.2f} |"
        )


HEAD = """\
| case | utilisation | algorithm | nodes | p50 ms | p99 ms | p99.9 ms | failed | max ÷ mean |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Plan:
    size: int  # clients, and endpoints
    nodes: tuple[int, ...]
    utilisations: tuple[float, ...]


QUICK, FULL = Plan(200, (1, 10, 200), (USUAL,)), Plan(1000, (1, 10, 100, 1000), UTILISATIONS)


def rows(plan: Plan) -> Iterator[Row]:
    """The algorithms in each case; then what might be done about it."""
    for name, case in CASES.items():
        for utilisation in plan.utilisations if name in ("equal", "slow", "tail") else (USUAL,):
            asked = requests(case, utilisation, plan.size)
            for how in (*ALGORITHMS, *(EJECTING if case.refuses else ())):
                for number in plan.nodes if how.is_local else (None,):
                    result = simulate(case, asked, how, number or 1, plan.size)
                    yield Row(name, utilisation, how.name, number, result)
    if plan.size < FULL.size:
        return
    number = 100
    for name, skew in (("equal", 0.0), ("equal", 0.5), ("slow", 0.0), ("refusing", 0.0)):
        case = CASES[name]
        asked = requests(case, USUAL, plan.size, skew)
        label = f"{name}, clients unequal" if skew else name
        hows = [RANDOM, APART, LEAST] if skew else []
        hows += [
            How(f"{LEAST.name}, {n} each", LEAST.algorithm, case.refuses, subset=n) for n in SUBSETS
        ]
        if case.refuses:
            hows.append(How(f"{LEAST.name}, eager ejection", LEAST.algorithm, True, eager=True))
        for how in hows:
            result = simulate(case, asked, how, number, plan.size)
            yield Row(label, USUAL, how.name, number, result)


def simulation(quick: bool) -> dict[str, object]:
    """Choice by what one node knows, by the number of nodes (simulated, no kernel)."""
    plan, found = QUICK if quick else FULL, list[Row]()
    print(f"{plan.size:,} clients, {plan.size:,} endpoints\n\n{HEAD}")
    gc.disable()  # nothing here is in circles, and much is alive
    try:
        for row in rows(plan):
            print(row, flush=True)
            found.append(row)
    finally:
        gc.enable()
    if PLOTS:
        from tests.bench import simulationplots

        simulationplots.draw(found, PLOTS)
    return {"rows": [asdict(row) for row in found]}


BENCHES = {"simulation": simulation}
