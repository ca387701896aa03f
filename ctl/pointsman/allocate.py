"""Who gives out runs of slots, and numbers. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class Extents:
    """Free runs within 0 … size-1: best fit, and neighbours are joined again.

    A run is taken from the smallest free one that fits, so that small sets don't break up the
    room of large ones. `free` joins a run with free neighbours, so nothing is lost in the long
    run: after every run was given back there is one free run again.
    """

    def __init__(self, size: int, used: Iterable[tuple[int, int]] = ()) -> None:
        """`used`: the runs (first, count) in use already, not overlapping, in ascending order."""
        self._length: dict[int, int] = {}  # first slot → length
        self._ending: dict[int, int] = {}  # slot after the last → first slot
        self._by_length: list[tuple[int, int]] = []  # (length, first), sorted
        self.available = 0
        at = 0
        for first, count in used:
            if first > at:
                self._add(at, first - at)
            at = first + count
        if size > at:
            self._add(at, size - at)

    def take(self, count: int) -> int | None:
        """The first slot of a run of `count`, None if there is no such run."""
        at = bisect_left(self._by_length, (count, 0))
        if at == len(self._by_length):
            return None
        length, first = self._by_length[at]
        self._remove(first, length)
        if length > count:
            self._add(first + count, length - count)
        return first

    def free(self, first: int, count: int) -> None:
        """Gives a run back."""
        before = self._ending.get(first)
        if before is not None:
            length = self._length[before]
            self._remove(before, length)
            first, count = before, count + length
        after = self._length.get(first + count)
        if after is not None:
            self._remove(first + count, after)
            count += after
        self._add(first, count)

    def _add(self, first: int, length: int) -> None:
        self._length[first] = length
        self._ending[first + length] = first
        insort(self._by_length, (length, first))
        self.available += length

    def _remove(self, first: int, length: int) -> None:
        del self._length[first]
        del self._ending[first + length]
        del self._by_length[bisect_left(self._by_length, (length, first))]
        self.available -= length


class Ids:
    """Numbers 1 … size-1; the ones given back longest ago are used again first."""

    def __init__(self, size: int, used: Iterable[int] = ()) -> None:
        taken = set(used)
        self._next = max(taken, default=0) + 1
        self._size = size
        self._free = deque(i for i in range(1, self._next) if i not in taken)

    def take(self) -> int | None:
        if self._next < self._size:
            self._next += 1
            return self._next - 1
        return self._free.popleft() if self._free else None

    def free(self, numbers: Iterable[int]) -> None:
        self._free.extend(numbers)

    @property
    def taken(self) -> int:
        return self._next - 1 - len(self._free)
