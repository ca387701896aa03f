"""Policies as the map has them."""

from __future__ import annotations

import sys

from pointsman import abi
from pointsman.policies import PolicyElement, ejected_in
from pointsman.values import Policy

_layout = abi.layouts()["policy"]


def element(policy: Policy, ejected: int) -> bytes:
    data = bytearray(_layout.packer("ejected")(ejected))
    for place, word in enumerate(PolicyElement(policy).words):
        data[8 * place : 8 * place + 8] = word.to_bytes(8, sys.byteorder)
    return bytes(data)


def test_of_those_ejected_only_the_watched_are_summed() -> None:
    watched, off = Policy(watch=True, streak=5), Policy(max_connections=9)
    found = [(watched, 2), (off, 4), (Policy(), 1), (watched, 0), (watched, 3)]
    memory = b"".join(element(*each) for each in found)
    assert ejected_in(memory, _layout.size, len(found)) == 5
    # What a page has behind the last element is no element.
    assert ejected_in(memory, _layout.size, 4) == 2
