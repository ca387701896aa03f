"""What a choice weighs: bpf/outcome.h and cost_of() of bpf/choose.h in Python, with their names.
Pure. Times are CLOCK_MONOTONIC in ns, connect times µs.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from pointsman import abi
from pointsman.outcomes import Outcomes
from pointsman.shares import MAX_WEIGHT, USUAL
from pointsman.values import Policy

_ABI = abi.constants()
ALGORITHM_MASK, LEAST_CONNECTIONS, PEAK_EWMA, ROUND_ROBIN, MAGLEV = (
    _ABI[f"ALGORITHM_{name}"]
    for name in ("MASK", "LEAST_CONNECTIONS", "PEAK_EWMA", "ROUND_ROBIN", "MAGLEV")
)
CHOICE_WEIGHTED, CHOICE_POLICY, CHOICE_AVOID, CHOICE_ZONE = (
    _ABI[f"CHOICE_{name}"] for name in ("WEIGHTED", "POLICY", "AVOID", "ZONE")
)
#: What bpf/outcome.h and bpf/choose.h define.
FADE, SLOW_US = 8_000_000_000, 1_000_000
DRAWS, ASKED = 4, 20
NEVER, AT_ONCE = inf, 0

#: Whether an endpoint gets connections, and if not, why.
READY, FULL, EJECTED, TRIAL, TRIAL_DUE = "ready", "full", "ejected", "trial", "trial-due"
NO_WEIGHT, OTHER_ZONE = "no-weight", "other-zone"
TAKEN = (READY, TRIAL_DUE)
#: Why an endpoint is ejected.
CONSECUTIVE_FAILURES, FAILED_CONNECTS = "consecutive-failures", "failed-connects"
BEFORE_TRIAL = "before-trial"


class Member(NamedTuple):
    """One endpoint of a set, as a choice finds it."""

    open: int = 0
    outcomes: Outcomes = Outcomes()
    weight: int = USUAL
    elsewhere: bool = False  # in another zone, where that counts


def faded(value: int, measured: int, now: int) -> int:
    halves = (now - measured) // FADE if now > measured else 0
    return value >> halves if halves < 32 else 0


def is_p2c(choice: int) -> bool:
    return choice & ALGORITHM_MASK in (LEAST_CONNECTIONS, PEAK_EWMA)


def connect_time(known: Outcomes, now: int) -> int:
    """0 if it is not known, or known no more."""
    return faded(known.latency, known.measured, now)


def state_of(member: Member, choice: int, policy: Policy | None, now: int) -> str:
    """Whether the programs would take this endpoint: may_be_taken(). `choice` is a service's
    algorithm: weights count if that has CHOICE_WEIGHTED, `policy` if it has CHOICE_POLICY."""
    if choice & (CHOICE_WEIGHTED | CHOICE_ZONE) and not member.weight:
        return NO_WEIGHT
    if choice & CHOICE_WEIGHTED and member.elsewhere:
        return OTHER_ZONE
    if policy and choice & CHOICE_POLICY:
        if policy.max_connections and member.open >= policy.max_connections:
            return FULL
        known = member.outcomes
        if choice & CHOICE_AVOID and known.until:
            if now >= known.until:
                return TRIAL_DUE
            return TRIAL if known.trial else EJECTED
    return READY


def cost_of(member: Member, choice: int, policy: Policy | None, now: int) -> float:
    """The less the better: AT_ONCE before all others, NEVER not at all."""
    state = state_of(member, choice, policy, now)
    if state != READY:
        return AT_ONCE if state == TRIAL_DUE else NEVER
    cost, known = member.open + 1, member.outcomes
    if choice & CHOICE_WEIGHTED:
        cost = member.open * MAX_WEIGHT // member.weight + MAX_WEIGHT // USUAL
    if choice & ALGORITHM_MASK == PEAK_EWMA:
        unknown = SLOW_US if member.open else 1
        cost *= 1 + (connect_time(known, now) if known.latency else unknown)
    if known.streak:
        cost *= 1 + faded(1 << min(known.streak, 8), known.measured, now)
    return cost


def spills_over(opened: int, policy: Policy | None) -> float:
    """How likely a connection that got an endpoint of its zone goes anywhere instead, by how many
    that has open."""
    return 1 - policy.room / opened if policy and opened > policy.room else 0.0


def reason_of(known: Outcomes, policy: Policy) -> str:
    """What speaks against the endpoint now, which is as a rule what ejected it: in a word."""
    if policy.streak and known.streak >= policy.streak:
        return CONSECUTIVE_FAILURES
    return FAILED_CONNECTS if known.failures else BEFORE_TRIAL


def why_ejected(known: Outcomes, policy: Policy) -> str:
    """The same, for people."""
    reason = reason_of(known, policy)
    if reason == CONSECUTIVE_FAILURES:
        return f"{known.streak} failures in a row"
    if reason == FAILED_CONNECTS:
        return f"{known.failures} of {known.connects} connects failed"
    return "failures before its last trial"
