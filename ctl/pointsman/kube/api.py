"""What the parts of the Kubernetes source say to each other about an API server: plain values.

`ApiServer` in `client` is the one implementation of `Api`; the rest of the source knows no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol


class ApiError(Exception):
    """An API server's refusal, or none at all.

    `status` is HTTP's; 0 means that the way there failed, or what came back was cut or garbled.
    `reason` is that of metav1.Status in CamelCase, such as "Expired". `retry_after` is in seconds,
    0 if the server asks for none.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def expired(self) -> bool:
        """The resourceVersion or the continue token is too old: list again."""
        return self.status == 410 or self.reason in ("Expired", "Gone")


class Stream(Protocol):
    """The answer to a watch. Iterating gives the complete lines that came together, at least one,
    without the line ends; it ends when the server ends the watch or `close` was called (any thread
    may), and raises ApiError with status 0 when the stream is cut, stalls or ends amid a line."""

    def __iter__(self) -> Iterator[list[bytes]]: ...
    def close(self) -> None: ...


class Api(Protocol):
    """Requests to an API server. All raise ApiError. Any thread may ask."""

    @property
    def server(self) -> str:
        """The URL that answered last."""

    def get(self, path: str, query: Mapping[str, str]) -> bytes: ...
    def stream(self, path: str, query: Mapping[str, str], seconds: int) -> Stream: ...
    def remember(self, cluster_ips: tuple[str, ...], endpoints: tuple[str, ...]) -> None: ...
