"""The figures of the bench of choosing: of one run, of all rounds, and the bars. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import NamedTuple

from tests.bench.choosingcases import AGAIN, CASES, RANDOM, Case
from tests.bench.report import ratio

NOT_ASKED, ANSWER, REFUSED, NO_CONNECTION, NO_ANSWER, CUT_OFF = range(6)  # of choosing.c


class Asked(NamedTuple):
    """A request: µs since the beginning, its outcome (see choosing.c), and µs until that."""

    when: int
    outcome: int
    latency: int


class Answers(NamedTuple):
    """Of one run: all that was asked, the connections that each endpoint has accepted, and how busy
    the machine was (a share of all CPUs)."""

    asked: list[Asked]
    accepted: list[int]
    cpu: float


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Milliseconds since a request was due (with `closed`: since it was asked), of all
    that got a connection or waited for one in vain; who was refused did not wait. `failed` are
    connects, `unanswered` are requests that had one; `rate` is answers a second; `fairness` max ÷
    mean of the connections that endpoints accepted; `canary` its share of them."""

    asked: int
    mean: float
    p50: float
    p99: float
    p999: float
    failed: int
    unanswered: int
    rate: float
    fairness: float | None
    canary: float | None
    cpu: float


def result(case: Case, answers: Answers) -> Result:
    asked = [
        request
        for request in answers.asked
        if request.when >= case.warm * 1e6 and request.outcome != NOT_ASKED
    ]
    waited = sorted(request.latency / 1000 for request in asked if request.outcome != REFUSED)
    ended = [request.outcome for request in asked]
    compared = [answers.accepted[endpoint] for endpoint in case.compared]
    p50, p99, p999 = (waited[int(len(waited) * part)] for part in (0.5, 0.99, 0.999))
    return Result(
        len(asked),
        mean(waited),
        p50,
        p99,
        p999,
        ended.count(REFUSED) + ended.count(NO_CONNECTION),
        ended.count(NO_ANSWER) + ended.count(CUT_OFF),
        ended.count(ANSWER) / case.seconds,
        max(compared) * len(compared) / sum(compared) if compared else None,
        None if case.canary is None else answers.accepted[case.canary] / sum(answers.accepted),
        answers.cpu,
    )


#: Case → arm → a result for each round.
Found = dict[str, dict[str, list[Result]]]

HEAD = """\
| algorithm | mean | p50 | p99, ms | p99.9 | failed connects | unanswered | max ÷ mean |{more}
|---|---|---|---|---|---|---|---|{line}"""


def table(name: str, arms: dict[str, list[Result]]) -> Iterator[str]:
    """Medians of the rounds, with the lowest and highest p99. Failures are those of all rounds."""
    case = CASES[name]
    extra = "answers/s" if case.closed else "canary" if case.canary is not None else ""
    yield HEAD.format(more=f" {extra} |" if extra else "", line="---|" if extra else "")
    for arm, results in arms.items():
        p99 = sorted(r.p99 for r in results)
        asked = sum(r.asked for r in results)
        fairness = [r.fairness for r in results if r.fairness is not None]
        cells = [
            arm,
            f"{median(r.mean for r in results):.1f}",
            f"{median(r.p50 for r in results):.1f}",
            f"{median(p99):.0f} ({p99[0]:.0f} … {p99[-1]:.0f})",
            f"{median(r.p999 for r in results):.0f}",
            _share(sum(r.failed for r in results), asked),
            _share(sum(r.unanswered for r in results), asked),
            f"{median(fairness):.2f}" if fairness else "",
        ]
        if case.closed:
            cells.append(f"{median(r.rate for r in results):.0f}")
        if case.canary is not None:
            cells.append(f"{median(r.canary or 0 for r in results):.2%}")
        yield f"| {' | '.join(cells)} |"


def _share(number: int, of: int) -> str:
    return f"{number} ({number / of:.2%})" if number else "0"


@dataclass(frozen=True, slots=True)
class Bar:
    """`worst` and `best` are of the rounds."""

    what: str
    arm: str
    value: float
    best: float
    worst: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.value <= self.at_most

    def __str__(self) -> str:
        spread = f"({self.best:.3f} … {self.worst:.3f})"
        judged = f"bar ≤ {self.at_most:.3f}  {'met' if self.met else 'NOT MET'}"
        return f"  {self.what:<48} {self.arm:<28} {self.value:8.3f} {spread}  {judged}"


def noise(found: Found) -> float:
    """By what random differs from random in p99, at most."""
    pairs = zip(found["equal"][AGAIN.name], found["equal"][RANDOM.name], strict=True)
    return max(max(a.p99 / b.p99, b.p99 / a.p99) for a, b in pairs)


def bars(found: Found) -> Iterator[Bar]:
    """What we hold ourselves to, for each arm; of the cases that were run."""
    if "refusing" in found:
        random = _failed(found["refusing"][RANDOM.name])
        for arm, results in found["refusing"].items():
            each = [a / b for a, b in zip(_failed(results), random, strict=True)]
            part = sum(_failed(results)) / sum(random)
            if arm != RANDOM.name:
                what = "one of ten refuses: failed connects ÷ random's"
                yield Bar(what, arm, part, min(each), max(each), 1 / 50)
    for case, what, at_most in (
        ("slow", "one of ten 10 × slower: p99 ÷ random's", 0.5),
        ("equal", "all equal: p99 ÷ random's", 0.0),
    ):
        if case not in found:
            continue
        at_most = at_most or noise(found)
        for arm, results in found[case].items():
            if arm in (RANDOM.name, AGAIN.name):
                continue
            value, low, high = ratio(_p99(results), _p99(found[case][RANDOM.name]))
            yield Bar(what, arm, value, low, high, at_most)


def _failed(results: Sequence[Result]) -> list[int]:
    """At least one, to divide by."""
    return [max(1, r.failed) for r in results]


def _p99(results: Sequence[Result]) -> list[float]:
    return [r.p99 for r in results]
