"""The bits that tell addresses with frontends from all others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.marks import Marks, bit_of, fold, words_for
from pointsman.values import Address, to_address

ADDRESSES = st.sampled_from([to_address(f"10.96.0.{n}") for n in range(1, 40)])


def is_set(words: dict[int, int], address: Address, count: int) -> bool:
    bit = bit_of(address, count)
    return bool(words.get(bit >> 6, 0) >> (bit & 63) & 1)


@pytest.mark.parametrize(
    ("frontends", "words"), [(1, 16), (1024, 256), (65536, 16384), (70000, 32768)]
)
def test_words(frontends: int, words: int) -> None:
    assert words_for(frontends) == words


@pytest.mark.parametrize(
    ("address", "folded"),
    [
        pytest.param("127.9.8.7", "127.0.0.1", id="loopback"),
        pytest.param("0.0.0.0", "127.0.0.1", id="unspecified"),
        pytest.param("::", "::1", id="unspecified-ipv6"),
        pytest.param("::1", "::1", id="loopback-ipv6"),
        pytest.param("10.96.0.1", "10.96.0.1", id="any-other"),
        pytest.param("7f00::1", "7f00::1", id="ipv6-that-looks-like-it"),
    ],
)
def test_fold(address: str, folded: str) -> None:
    assert fold(to_address(address)) == to_address(folded)


@given(st.lists(st.tuples(st.booleans(), ADDRESSES), max_size=200), st.sampled_from([1, 16, 1024]))
def test_an_address_with_a_frontend_is_always_marked(
    changes: list[tuple[bool, Address]], count: int
) -> None:
    """Writes come before the first frontend and after the last; few words make bits be shared."""
    marks, words, present = Marks(count), dict[int, int](), list[Address]()
    for adds, address in changes:
        if adds:
            if word := marks.add(address):
                words[word[0]] = word[1]
            present.append(address)
        elif address in present:
            present.remove(address)
            if word := marks.remove(address):
                words[word[0]] = word[1]
        assert all(is_set(words, each, count) for each in present)
        assert {i: word for i, word in words.items() if word} == marks.words
    for address in present:
        marks.remove(address)
    assert not marks.words


def test_few_other_addresses_are_marked() -> None:
    count = words_for(65536)
    marks = Marks(count)
    for n in range(32768):  # a ClusterIP has two frontends at least
        marks.add(to_address(f"10.{96 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"))
    words = marks.words
    others = [to_address(f"192.168.{n >> 8}.{n & 255}") for n in range(20000)]
    assert sum(is_set(words, other, count) for other in others) < 0.05 * len(others)
