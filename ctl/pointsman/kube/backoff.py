"""How long to wait before the next try. Pure, but for chance."""

from __future__ import annotations

import random
from collections.abc import Callable

_LONGEST = 120.0  # a Retry-After beyond it is not believed


class Backoff:
    """Exponential with full jitter: after n failures in a row a time from 0 to `first` × 2^(n-1)
    seconds, `longest` at most. Jitter keeps a cluster's agents from coming back all at once."""

    def __init__(
        self,
        first: float = 0.8,
        longest: float = 30.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._first, self._longest, self._uniform = first, longest, uniform
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def after(self, retry_after: float = 0.0) -> float:
        """Seconds to wait after one more failure, not less than what the server asks for."""
        window = min(self._longest, self._first * 2 ** min(self._failures, 30))
        self._failures += 1
        return min(retry_after, _LONGEST) + self._uniform(0.0, window)
